from shohin.passes import pass_names


def test_lists_every_pass_on_a_line(shell) -> None:
    done = shell("passes")
    assert [line.split()[0] for line in done.out.splitlines()] == list(pass_names())
    found = shell("passes", "--json").json()["passes"]
    assert [item["name"] for item in found] == list(pass_names())
    assert all(item["summary"].endswith(".") for item in found)


def test_describes_one(shell) -> None:
    done = shell("passes", "prune")
    assert "Keep the weights" in done.out
    assert "establishes  pruned" in done.out
    (line,) = (line for line in done.out.splitlines() if line.startswith("exclude"))
    assert line.split() == ["exclude", "[str]", "[]"]
    found = shell("passes", "prune", "--json").json()
    assert found["establishes"] == ["pruned"]
    assert found["options"][0]["name"] == "density"


def test_unknown_pass(shell) -> None:
    shell("passes", "prun").fails(2, "unknown pass 'prun'", "did you mean 'prune'?")
