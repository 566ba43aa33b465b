"""The output folder: whole or not at all, and never in the way of what was there."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from headfuse.claim import CLAIM
from headfuse.errors import CheckpointError, ConfigError
from headfuse.folder import SPARE_BYTES, OutputFolder, check_output, run_folder_of, writing
from headfuse.manifest import Manifest, git_commit, identify, manifest
from pico import pico


def attempt(out, **options):
    """The message of the refusal to write, which must be one line."""
    with pytest.raises(ConfigError) as caught, writing(out, **options) as folder:
        (folder.root / "config.json").write_text("new")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def old(tmp_path):
    """An output that stands already."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "old.txt").touch()
    return out


def write(out, work, **options):
    """Do `work` on the temporary folder."""
    with writing(out, **options) as folder:
        work(folder)


def raising(error):
    """Work that writes something and fails."""

    def work(folder):
        (folder.root / "model.safetensors").write_bytes(b"half")
        raise error

    return work


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_folder_appears_whole(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with writing(out) as folder:
        (folder.root / "config.json").write_text("new")
        folder.plan.write_text("{}")
        assert not out.exists()
    assert names(out) == ["config.json", "headfuse"]
    assert names(out.parent) == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with writing(out) as folder:
        (folder.root / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_taken_folder_is_refused(old):
    assert "--overwrite" in attempt(old)
    assert names(old) == ["config.json", "old.txt"]


def test_overwrite_replaces_the_whole_folder(old):
    with writing(old, overwrite=True) as folder:
        (folder.root / "config.json").write_text("new")
        assert (old / "config.json").read_text() == "old"
    assert names(old) == ["config.json", "headfuse"]
    assert names(old.parent) == ["out"]


def test_overwrite_spares_a_folder_that_holds_no_model(old):
    (old / "config.json").rename(old / "thesis.txt")
    assert "replaces models only" in attempt(old, overwrite=True)
    assert names(old) == ["old.txt", "thesis.txt"]


def test_a_folder_that_is_taken_meanwhile_is_spared(tmp_path):
    out = tmp_path / "out"

    def work(folder):
        out.mkdir()
        (out / "other.txt").touch()

    with pytest.raises(ConfigError, match="exists and is not empty"):
        write(out, work)
    assert names(out) == ["other.txt"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    assert "is a file" in attempt(tmp_path / "out")
    assert "is a file" in attempt(tmp_path / "out" / "model", needed_bytes=1)


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "got the current one; choose a folder inside it" in attempt(Path())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "run"), [("~/out", "home/out.run"), (".", "here.run"), ("a/../out", "here/out.run"), ("/", "/.run")]
)
def test_a_run_lives_beside_its_output(tmp_path, monkeypatch, out, run):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_folder_of(Path(out)) == tmp_path / run


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    assert "mount point" in attempt(tmp_path)


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_model_is_never_written_to(tmp_path, place):
    model = tmp_path / "models" / "llama"
    model.mkdir(parents=True)
    (model / "config.json").write_text("source")
    assert "separate folders" in attempt(model / place, source=model, overwrite=True)
    assert names(model) == ["config.json"]


def test_a_link_to_the_model_is_the_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert "separate folders" in attempt(tmp_path / "link", source=tmp_path / "model")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), SystemExit(), CheckpointError("bad")])
def test_whatever_ends_the_work_leaves_nothing_behind(old, error):
    new = old.parent / "deep" / "new"
    for out in (old, new):
        with pytest.raises(type(error)):
            write(out, raising(error), overwrite=True)
    assert names(old.parent) == ["out"]
    assert (old / "config.json").read_text() == "old"


def test_a_parent_that_others_use_meanwhile_is_kept(tmp_path):
    def work(folder):
        (tmp_path / "a" / "other").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a" / "out", work)
    assert names(tmp_path / "a") == ["other"]


def test_a_place_that_is_on_no_disk_is_not_called_a_full_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))  # as /proc
    message = attempt(tmp_path / "a" / "out", needed_bytes=1)
    assert "cannot be written" in message
    assert "GB" not in message


def test_too_little_disk_space_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with writing(tmp_path / "small", needed_bytes=10**6):
        pass
    message = attempt(tmp_path / "a" / "big", needed_bytes=2 * 10**9)
    assert "2.02 GB" in message
    assert "1.00 GB are free" in message
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_one_line(old, code):
    with pytest.raises(ConfigError) as caught:
        write(old, raising(OSError(code, os.strerror(code))), overwrite=True, needed_bytes=10**6)
    assert "the disk is full" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(old.parent) == ["out"]
    assert names(old) == ["config.json", "old.txt"]


def test_a_full_disk_that_safetensors_reports_is_one_line(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(ConfigError, match="the disk is full"), writing(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    def write(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder.root / "config.json"))

    with pytest.raises(ConfigError, match="cannot be written"), writing(tmp_path / "out") as folder:
        write(folder)


def test_another_file_that_may_not_be_read_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(PermissionError), writing(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/text.txt")


def test_files_get_the_permissions_of_the_umask(tmp_path):
    with writing(tmp_path / "out") as folder:
        (folder.root / "model.safetensors").touch(mode=0o600)
        (folder.root / "other.txt").touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*.*")}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_ctrl_c_in_a_real_process_leaves_nothing_behind(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from headfuse.folder import writing\n"
        "with writing(Path(sys.argv[1])) as folder:\n"
        "    (folder.root / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    import time; time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, check=False)
    assert b"KeyboardInterrupt" in done.stderr
    assert names(tmp_path) == []


WRITER = """
import os, shutil, signal, sys, time
from pathlib import Path
from headfuse.folder import writing

def kill(*ignored, **options):
    os.kill(os.getpid(), signal.SIGKILL)

with writing(Path(sys.argv[1]), overwrite=True) as folder:
    (folder.root / "config.json").write_text("newer")
    {fate}
"""
KILLED = "kill()"
# The renames of the old folder, of the new one, and the removals behind them.
KILLED_BETWEEN_RENAMES = "rename = Path.rename; Path.rename = lambda a, b: kill() if a.name == 'new' else rename(a, b)"
KILLED_BEHIND_RENAMES = "shutil.rmtree = kill"
LIVING = "print('writing', flush=True); time.sleep(300)"


def leave(out, fate=KILLED):
    """What a real killed process leaves beside `out`."""
    done = subprocess.run([sys.executable, "-c", WRITER.format(fate=fate), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    (partial,) = out.parent.glob(".out.partial-*")
    return partial


@contextmanager
def living(out):
    """A real process that writes to `out` within the context; it is killed at the end."""
    command = [sys.executable, "-c", WRITER.format(fate=LIVING), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield
        finally:
            process.kill()


def write_new(folder):
    (folder.root / "config.json").write_text("new")


def test_the_next_write_removes_what_a_killed_process_left(tmp_path):
    out = tmp_path / "out"
    partial = leave(out)
    with pytest.warns(UserWarning, match=rf"out: removed {partial.name} .* a killed process") as said:
        write(out, write_new)
    assert [str(each.message).count("\n") for each in said] == [0]
    assert said[0].filename == __file__
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_what_a_living_process_writes_is_kept(tmp_path):
    out = tmp_path / "out"
    with living(out):
        (partial,) = tmp_path.glob(".out.partial-*")
        write(out, write_new)
        assert names(tmp_path) == [partial.name, "out"]
        assert (partial / "new" / "config.json").read_text() == "newer"
    with pytest.warns(UserWarning, match="a killed process"):
        write(out, write_new, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_what_this_process_writes_at_the_same_time_is_kept(tmp_path):
    out = tmp_path / "out"
    with writing(out, overwrite=True) as folder:
        write_new(folder)
        write(out, write_new)
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("owner", ["another\n01234567-89ab-cdef-0123-456789abcdef\n", "", None])
def test_what_another_host_or_nobody_known_left_is_kept(tmp_path, owner):
    out = tmp_path / "out"
    partial = leave(out)
    if owner is None:  # a process that has made its folder and not claimed it yet
        (partial / CLAIM).unlink()
    else:
        (partial / CLAIM).write_text(owner)
    write(out, write_new)
    assert names(tmp_path) == [partial.name, "out"]
    assert (partial / "new" / "config.json").read_text() == "newer"


def test_what_was_left_of_another_output_is_kept(tmp_path):
    partial = leave(tmp_path / "out")
    for name in ("o", "ou", "o?t", "out2", ".out"):
        write(tmp_path / name, write_new)
    assert partial.is_dir()


def test_a_kill_between_the_two_renames_loses_nothing(old):
    leave(old, KILLED_BETWEEN_RENAMES)
    assert not old.exists()
    with pytest.warns(UserWarning, match="a killed process"), pytest.raises(ConfigError, match="--overwrite"):
        write(old, write_new)
    assert names(old) == ["config.json", "old.txt"]
    assert names(old.parent) == ["out"]


def test_a_kill_behind_the_renames_leaves_the_new_folder(old):
    leave(old, KILLED_BEHIND_RENAMES)
    assert (old / "config.json").read_text() == "newer"
    with pytest.warns(UserWarning, match="a killed process"):
        write(old, write_new, overwrite=True)
    assert names(old) == ["config.json", "headfuse"]
    assert names(old.parent) == ["out"]


def test_the_room_of_what_will_be_removed_counts_as_free(tmp_path, monkeypatch):
    out, needed = tmp_path / "out", 10**6
    partial = leave(out)
    free = SPARE_BYTES + needed // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10 - free, free))
    with pytest.raises(ConfigError, match="GB are free"):
        check_output(out, overwrite=False, needed_bytes=needed, source=None)
    with (partial / "new" / "model.safetensors").open("wb") as file:
        file.truncate(needed)
    check_output(out, overwrite=False, needed_bytes=needed, source=None)
    assert partial.is_dir()


def test_the_names_are_those_of_the_documentation(tmp_path):
    out = OutputFolder(tmp_path)
    paths = (out.manifest, out.plan, out.parity, out.evaluation, out.config, out.model_card)
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "headfuse/manifest.json",
        "headfuse/plan.json",
        "headfuse/parity.json",
        "headfuse/eval",
        "config.json",
        "README.md",
    ]


def test_a_manifest_says_how_and_reads_back(tmp_path):
    pico("llama").save_pretrained(tmp_path)
    source = identify(tmp_path, name="llama", revision="0123abc")
    made = manifest(["headfuse", "convert"], seed=3, source=source, seconds={"plan": 1.23456})
    made.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == made
    assert made.versions.keys() >= {"python", "torch", "transformers", "headfuse"}
    assert made.versions["torch"] == torch.__version__
    assert made.hardware.cores >= 1
    assert made.hardware.cpu
    assert made.peak_memory_bytes["process"] > 10**7
    assert made.seconds == {"plan": 1.235}


def test_identity_changes_with_configuration_and_header_only(tmp_path):
    for name, layers in (("a", 2), ("b", 2), ("c", 1)):
        pico("llama", num_hidden_layers=layers).save_pretrained(tmp_path / name)
    a, b, c = (identify(tmp_path / name, name="model") for name in "abc")
    assert a == b
    assert a.config_sha256 != c.config_sha256
    assert a.weights_sha256 != c.weights_sha256


@pytest.mark.parametrize("text", ["{", "{}", '{"version": 2}'])
def test_a_manifest_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
        Manifest.load(tmp_path / "manifest.json")
    assert "\n" not in str(caught.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkout(tmp_path):
    """A checkout of headfuse with nothing in it."""
    package = tmp_path / "src" / "headfuse"
    package.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    return package


def test_the_commit_of_a_branch(checkout, tmp_path):
    reference = tmp_path / ".git" / "refs" / "heads" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT + "\n")
    assert git_commit(checkout) == COMMIT


def test_the_commit_of_a_packed_branch(checkout, tmp_path):
    (tmp_path / ".git" / "packed-refs").write_text(f"# pack-refs\n{COMMIT} refs/heads/main\n")
    assert git_commit(checkout) == COMMIT


def test_the_commit_of_a_detached_head(checkout, tmp_path):
    (tmp_path / ".git" / "HEAD").write_text(COMMIT + "\n")
    assert git_commit(checkout) == COMMIT


def test_the_commit_of_a_worktree(checkout, tmp_path):
    worktree = tmp_path / ".git" / "worktrees" / "w"
    worktree.mkdir(parents=True)
    (worktree / "HEAD").write_text("ref: refs/heads/side\n")
    (worktree / "commondir").write_text("../..\n")
    (tmp_path / ".git" / "packed-refs").write_text(f"{COMMIT} refs/heads/side\n")
    package = tmp_path / "w" / "src" / "headfuse"
    package.mkdir(parents=True)
    (tmp_path / "w" / ".git").write_text(f"gitdir: {worktree}\n")
    assert git_commit(package) == COMMIT


def test_no_commit_before_the_first_or_outside_a_checkout(checkout, tmp_path):
    assert git_commit(checkout) is None
    installed = tmp_path / "lib" / "site-packages" / "headfuse"
    installed.mkdir(parents=True)
    assert git_commit(installed) is None
