from shohin.backends.registry import target_kinds


def test_lists_every_kind_on_a_line(shell) -> None:
    done = shell("targets")
    assert [line.split()[0] for line in done.out.splitlines()] == list(target_kinds())
    found = shell("targets", "--json").json()["targets"]
    assert [item["kind"] for item in found] == list(target_kinds())
    assert {"cpu", "arm", "armv7"} <= {item["kind"] for item in found}


def test_describes_one(shell) -> None:
    done = shell("targets", "arm")
    assert done.out.startswith("arm\n\nA 64-bit ARM processor to compile for.\n")
    (line,) = (line for line in done.out.splitlines() if line.startswith("arm{dotprod=on}"))
    assert line.split() == [
        "arm{dotprod=on}", "asimd", "asimddp", "4", "sdot", "smlal", "tbl", "no",
    ]  # fmt: skip
    rows = [line.split() for line in done.out.splitlines()]
    assert ["dotprod", "auto", "|", "on", "|", "off", "auto"] in rows
    assert "dotprod  whether sums of products of bytes are formed by sdot" in done.out
    found = shell("targets", "cpu", "--json").json()
    assert [option["name"] for option in found["options"]][:2] == ["arch", "threads"]
    facts = {one["text"]: one["facts"] for one in found["variants"]}
    assert facts["cpu{arch=x86-64-v3-vnni}"]["int8"] == "vpdpbusd"
    assert facts["cpu{arch=x86-64-v2}"]["needs"] == "sse4_1 sse4_2 ssse3"


def test_one_without_options(shell) -> None:
    assert shell("targets", "reference").out == (
        "reference\n\nPyTorch in this process; it has no options.\n"
    )


def test_unknown_kind(shell) -> None:
    shell("targets", "armv8").fails(2, "unknown target 'armv8'", "did you mean 'arm")
