"""Folders as people have them: links, system folders, numbered classes, odd names."""

import os

import numpy as np
import pytest
from PIL import Image

from detailflow_jax.data import make_source
from detailflow_jax.data.folders import Folder, class_folders, find_images, natural_order
from detailflow_jax.evaluate.samples import PictureSource
from detailflow_jax.runtime.errors import ConfigError


def add(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(root / name, "PNG")


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the walker, as text."""
    told = []
    module = "detailflow_jax.data.folders.logging.warning"
    monkeypatch.setattr(module, lambda text, *args: told.append(text % args))
    return told


SYSTEM = ("__MACOSX", "@eaDir", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN", ".git")
SYSTEM += ("@SynoResource", "@Recycle", "@Transcode", "~snapshot", "LOST.DIR", "FOUND.000")
SYSTEM += ("Network Trash Folder", "Temporary Items")


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_the_system_are_left_out_with_one_notice(tmp_path, warnings, name):
    add(tmp_path, "cat/1.png", "dog/1.png", f"{name}/1.png", f"cat/{name}/2.png", "cat/._1.png")
    (tmp_path / ".DS_Store").touch()
    assert class_folders(str(tmp_path)) == {"cat": ["1.png"], "dog": ["1.png"]}
    assert len(warnings) == 1 and "3 hidden or system entries" in warnings[0]
    assert find_images(tmp_path) == ["cat/1.png", "dog/1.png"]
    assert len(PictureSource(tmp_path)) == 2
    assert len(warnings) == 3 and len(set(warnings)) == 1


def test_linked_class_folders_and_files_count_everywhere(tmp_path):
    add(tmp_path, "store/a/1.png", "store/a/2.png", "set/dog/1.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "set" / "dog" / "3.png").symlink_to(tmp_path / "store" / "a" / "1.png")
    expected = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png"]
    source = make_source(f"folder:{tmp_path / 'set'}")
    assert source._files == expected and source.class_names == ("cat", "dog")
    assert find_images(tmp_path / "set") == expected
    (tmp_path / "set" / "dog" / "up").symlink_to(tmp_path / "set")  # A circle.
    assert find_images(tmp_path / "set") == expected


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path):
    add(tmp_path, "1.png/2.png", "b/c.png/3.png")
    assert find_images(tmp_path) == ["1.png/2.png", "b/c.png/3.png"]
    with pytest.raises(ValueError, match="b holds folders"):
        class_folders(str(tmp_path))


def test_a_line_end_in_its_name_costs_no_image(tmp_path):
    add(tmp_path, "cat/1.png", "cat/a\nb.PNG")
    assert find_images(tmp_path) == ["cat/1.png", "cat/a\nb.PNG"]
    assert class_folders(str(tmp_path)) == {"cat": ["1.png", "a\nb.PNG"]}


def test_pipes_are_not_images(tmp_path):
    add(tmp_path, "cat/1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")  # To read it would wait for ever.
    assert find_images(tmp_path) == ["cat/1.png"]
    assert class_folders(str(tmp_path)) == {"cat": ["1.png"]}


def test_a_broken_or_circular_link_is_one_unreadable_image(tmp_path):
    add(tmp_path, "cat/1.png")
    (tmp_path / "cat" / "2.png").symlink_to("nowhere.png")
    (tmp_path / "cat" / "3.png").symlink_to("3.png")
    source = make_source(f"folder:{tmp_path}")
    assert len(source) == 3 and source.fingerprint.startswith("folder:")
    for index in (1, 2):
        with pytest.raises(Exception, match=rf"cat/{index + 1}\.png"):
            source[index]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cat.zip": b"PK"}, r"holds no folders but cat\.zip: expected one subfolder"),
        ({"cat/1": b"\xff\xd8"}, "cat holds no images, but files such as 1: .*by suffix"),
    ],
)
def test_what_is_there_instead_of_images_is_named(tmp_path, content, message):
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        class_folders(str(tmp_path))


def test_a_packed_set_and_a_class_that_is_not_mounted(tmp_path):
    add(tmp_path, "set/cat/1.png", "set.zip")
    with pytest.raises(FileNotFoundError, match=r"set\.zip', but a file, which may have to be unp"):
        make_source(f"folder:{tmp_path}/set.zip")
    (tmp_path / "set" / "dog").symlink_to("/mnt/nas/dog")
    with pytest.raises(ConfigError, match="dog is a link to /mnt/nas/dog, which is not there"):
        make_source(f"folder:{tmp_path}/set")


def test_folders_may_be_deeper_than_python_nests_calls(monkeypatch):
    def listed(path):
        return Folder(["d"] if path.count("/d") < 1000 else [], ["1.png"], [], [])

    monkeypatch.setattr("detailflow_jax.data.folders.list_folder", listed)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    assert len(find_images("root")) == 1001


def test_a_path_that_is_none_is_told_to_the_user():
    with pytest.raises(ConfigError, match=r"cannot look at aaa.*too long"):
        class_folders("a" * 5000)


def test_what_cannot_be_listed_is_told_to_the_user(tmp_path, monkeypatch):
    add(tmp_path, "cat/1.png")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    for walk in (class_folders, find_images):
        with pytest.raises(ValueError, match=r"cannot list the folder .*: Permission denied"):
            walk(str(tmp_path))


def test_numbers_in_class_names_are_ordered_by_value_with_a_notice(tmp_path, warnings):
    add(tmp_path, *(f"{number}/1.png" for number in range(12)))
    assert list(class_folders(str(tmp_path))) == [str(number) for number in range(12)]
    assert len(warnings) == 1 and "label 2 is '2', not '10'" in warnings[0]


def test_other_names_keep_their_order_without_a_notice(tmp_path, warnings):
    names = ["n01440764", "n02105855", "a-1", "a1", "B", "a_", "a", "é", "7"]
    add(tmp_path, *(f"{name}/1.png" for name in names))
    assert list(class_folders(str(tmp_path))) == sorted(names) and not warnings
    assert natural_order(["v10", "v9", "v9b"]) == ["v9", "v9b", "v10"]


def test_classes_txt_gives_the_order(tmp_path, warnings):
    add(tmp_path, *(f"{number}/1.png" for number in (1, 2, 10)))
    listed = tmp_path / "classes.txt"
    listed.write_bytes(b"\xef\xbb\xbf10\r\n1\r\n\r\n2\r\n")  # As Windows writes it.
    assert list(class_folders(str(tmp_path))) == ["10", "1", "2"] and not warnings
    for text, message in (
        ("10\n1\n", "lacks the folder '2'"),
        ("10\n1\n2\n3\n", "there is no folder '3'"),
        ("10\n1\n2\n1\n", "lists '1' twice"),
    ):
        listed.write_text(text)
        with pytest.raises(ValueError, match=message):
            class_folders(str(tmp_path))
    add(tmp_path, "cafe\u0301/1.png")  # As macOS writes it.
    listed.write_text("10\ncaf\u00e9\n1\n2\n", encoding="utf-8")
    assert list(class_folders(str(tmp_path))) == ["10", "cafe\u0301", "1", "2"]
    add(tmp_path, "end /1.png")
    listed.write_text("10\ncaf\u00e9\n1\n2\nend\n \n", encoding="utf-8")
    assert list(class_folders(str(tmp_path)))[-1] == "end "
    listed.write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(ValueError, match="expected UTF-8"):
        class_folders(str(tmp_path))


@pytest.mark.parametrize("twins", [("caf\u00e9", "cafe\u0301"), ("dog", "dog ")])
def test_classes_that_are_typed_the_same_are_told_apart_by_nobody(tmp_path, twins):
    add(tmp_path, *(f"{name}/1.png" for name in twins))
    with pytest.raises(ConfigError, match=r"two classes have the name '(caf\u00e9|dog)'"):
        class_folders(str(tmp_path))
