"""The proof that megatron-core is unmodified: it holds for the real wheel, and every kind of change breaks it."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from megatron_patch.backend.wheel import WheelReport, check_wheel
from tests.backend.fake_packages import install

FILES = {"fakecore/core/__init__.py": "", "fakecore/core/a.py": "a = 1\n", "fakecore/core/sub/b.py": "b = 2\n"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    install(folder, "fake-core", "1.0", FILES)
    monkeypatch.syspath_prepend(folder)
    return folder


def check() -> WheelReport:
    return check_wheel("fake-core", "fakecore/core")


def test_the_installed_megatron_core_is_unmodified() -> None:
    report = check_wheel()
    assert report.intact, str(report)
    assert report.num_files > 300


def test_the_proof_takes_less_than_a_second() -> None:
    start = time.perf_counter()
    check_wheel()
    assert time.perf_counter() - start < 0.7


def test_untouched_files_are_intact(site: Path) -> None:
    assert check() == WheelReport("1.0", 3, (), (), (), None)


def test_one_changed_character_is_found(site: Path) -> None:
    (site / "fakecore/core/a.py").write_text("a = 2\n")
    assert check().modified == ("fakecore/core/a.py",)
    assert str(check()) == "modified: fakecore/core/a.py"


def test_a_deleted_file_is_found(site: Path) -> None:
    (site / "fakecore/core/sub/b.py").unlink()
    assert check().missing == ("fakecore/core/sub/b.py",)
    assert not check().intact


def test_an_added_module_is_found_and_a_cache_is_not(site: Path) -> None:
    (site / "fakecore/core/added.py").touch()
    (site / "fakecore/core/__pycache__").mkdir()
    (site / "fakecore/core/__pycache__/a.cpython-311.pyc").touch()
    assert check().extra == ("fakecore/core/added.py",)


def test_a_checkout_in_front_of_the_wheel_is_found(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "fakecore/core").mkdir(parents=True)
    (checkout / "fakecore/core/__init__.py").touch()
    monkeypatch.syspath_prepend(checkout)
    assert check().hidden_by == str(checkout / "fakecore")
    assert not check().intact


def test_many_changes_are_counted_and_not_all_listed(site: Path) -> None:
    for number in range(5):
        (site / f"fakecore/core/new{number}.py").touch()
    assert str(check()).endswith("new2.py and 2 more")


def test_a_package_without_hashes_is_not_called_intact(site: Path) -> None:
    (site / "fake_core-1.0.dist-info/RECORD").write_text("")
    assert not check().intact
    assert "no hashes" in str(check())


def test_a_package_that_is_not_there_is_an_error() -> None:
    with pytest.raises(PackageNotFoundError):
        check()
