"""Functions that a config names: built-in, `module:function` or `path/file.py:function`. Errors have one line."""

import sys

import pytest

from grpo_jax.config.functions import function_label, resolve_function
from grpo_jax.errors import UserError

OURS = {"accuracy": len, "format": max}


def resolve(name, hint=""):
    return resolve_function(name, "reward.parts", OURS, hint)


def write(path, text) -> str:
    path.write_text(text)
    return str(path)


def refused(name, hint="") -> str:
    """Returns the error message for a name that must be refused."""
    with pytest.raises(UserError) as raised:
        resolve(name, hint)
    assert "\n" not in str(raised.value) and "reward.parts" in str(raised.value)
    return str(raised.value)


def test_a_bare_name_is_a_built_in_function():
    assert resolve("accuracy") is len and resolve("format") is max


def test_a_function_is_found_in_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    write(tmp_path / "my_package" / "parts.py", "def short(): return 5")
    assert resolve("my_package.parts:short")() == 5


def test_a_function_is_found_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "b-c.py", "def short(): return 5")
    assert [resolve(f"{folder}a/b-c.py:short")() for folder in (f"{tmp_path}/", "~/", "./", "")] == [5] * 4


def test_a_file_is_imported_once_and_files_with_the_same_name_are_distinct(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    write(tmp_path / "f.py", "calls = []\ndef first(): return calls\ndef second(): return calls")
    write(tmp_path / "other" / "f.py", "def first(): return 'other'")
    resolve("f.py:first")().append(1)
    assert resolve(f"{tmp_path}/other/../f.py:second")() == [1]
    assert resolve("other/f.py:first")() == "other"
    assert "f" not in sys.modules  # the module has a private name, so that `import f` keeps its meaning


def test_a_file_that_was_edited_is_imported_again(tmp_path):
    path = tmp_path / "f.py"
    assert resolve(f"{write(path, 'def f(): return 1')}:f")() == 1
    assert resolve(f"{write(path, 'def f(): return 200')}:f")() == 200


def test_a_file_may_define_dataclasses(tmp_path):
    """`dataclass` looks up the module of the class in sys.modules when annotations are strings."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "@dataclass\nclass Point:\n    x: int\ndef f(): return Point(3).x"
    assert resolve(f"{write(tmp_path / 'f.py', text)}:f")() == 3


@pytest.mark.parametrize("name, label", [("accuracy", "accuracy"), ("a.b:short", "short"), ("~/x/f.py:short", "short")])
def test_the_label_is_the_name_of_the_function(name, label):
    assert function_label(name) == label


@pytest.mark.parametrize("name", ["acuracy", "sums", "", ":", "os:", ":path", "dir/file:f", "f.py", "os:a.b", "os:a-b"])
def test_a_name_in_none_of_the_three_forms_is_refused(name):
    message = refused(name)
    says = f"must be 'accuracy', 'format', module:function or path/file.py:function; found {name!r}. "
    assert says in message and message.endswith("Did you mean 'accuracy'?" if name == "acuracy" else "name.")


def test_the_hint_is_added_only_for_unknown_names_without_a_colon():
    assert refused("acuracy", "Also read this.").endswith("Did you mean 'accuracy'? Also read this.")
    assert "Also read this" not in refused("os:", "Also read this.")


def test_a_missing_file_module_or_function_is_refused(tmp_path):
    assert "found no file none.py. Correct the path" in refused("none.py:f")
    assert f"found no file {tmp_path}/d.py" in refused(f"{tmp_path}/d.py:f")
    assert "found no module 'no_such_module'. Correct the name, add" in refused("no_such_module.parts:f")
    assert "found no module 'os.parts'" in refused("os.parts:f")
    file = write(tmp_path / "f.py", "def short(): pass\nx = 5")
    assert f"must name a function in {file}; found none. Did you mean 'short'?" in refused(f"{file}:shrt")
    assert "found none. Define it there." in refused(f"{file}:xyzzy")
    assert "found x of type int." in refused(f"{file}:x")


@pytest.mark.parametrize(
    "text, says",
    [
        ("x = 1\nraise ValueError('two\\nlines')", "raised ValueError: two lines ({file}:2). Correct it."),
        ("x = 1\n\ndef f(:", "raised SyntaxError: invalid syntax ({file}:3)"),
        ("def f(): pass\nimport no_such_library", "ModuleNotFoundError: No module named 'no_such_library' ({file}:2)"),
        ("import sys\nsys.exit(3)", "raised SystemExit: 3 ({file}:2)"),
        ("raise ValueError('word ' * 1000)", "word ... ({file}:1)"),
    ],
)
def test_an_exception_while_importing_a_file_is_reported_in_one_line_with_its_location(tmp_path, text, says):
    file = write(tmp_path / "f.py", text)
    for _ in range(2):  # a file that failed does not count as imported
        message = refused(f"{file}:f")
        assert says.format(file=file) in message and len(message) < 1000


def test_a_module_that_lacks_a_library_is_distinguished_from_a_missing_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "module_that_lacks.py", "import no_such_library")
    assert f"importing it raised ModuleNotFoundError: No module named 'no_such_library' ({file}:1)" in refused(
        "module_that_lacks:f"
    )
