def test_names_the_pass_and_the_layer(shell, net) -> None:
    command = ["bisect", f"{net}:known", "--data", f"{net}:batches"]
    done = shell(*command, "--passes", "fold-bn, prune{density=0.5}", "--tolerance", "0.01")
    assert done.code == 1, done.err
    assert done.err == ""
    assert done.out.startswith("pass 'prune{density=0.5}' (2 of 2) breaks the program at")
    assert "(layer " in done.out
    done = shell(*command, "--passes", "fold-bn, prune", "--json")
    assert done.code == 1
    found = done.json()
    assert found["culprit"] == "prune"
    assert found["probes"][0]["broken"]


def test_nothing_is_broken(shell, net) -> None:
    done = shell("bisect", f"{net}:known", "--passes", "fold-bn")
    assert done.code == 0, done.err
    assert done.out.startswith("no pass of 'fold-bn' breaks the program")
    done = shell("bisect", f"{net}:known", "--passes", "prune", "--evaluate", f"{net}:accuracy")
    assert done.out.startswith("no pass of 'prune' breaks the program")


def test_wrong_input(shell, net) -> None:
    shell("bisect", f"{net}:known", "--passes", "fold").fails(2, "unknown pass 'fold'")
    done = shell("bisect", f"{net}:known", "--passes", "prune", "--data", f"{net}:labelled")
    done.fails(3, "2 example inputs do not fit forward(x)")
