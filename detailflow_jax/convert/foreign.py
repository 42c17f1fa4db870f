"""What files are that PyTorch did not write, and how to make checkpoints of those with weights.

They are known by their first bytes and are not read: pickles would run code, and the other formats
need libraries of their own.
"""

import re
from pathlib import PurePath

NO_TORCH = "a pickle, but not one of torch.save"
RESAVE = "import pickle, torch; torch.save(pickle.load(open(FILE, 'rb')), TORCH)"
_MEMBER = rb"PK\x03\x04.{26}[^\0]*?"  # of a zip archive, the first one's name
_SAVE = "from safetensors.numpy import save_file; "
_JOBLIB = "import joblib, torch; torch.save(joblib.load(FILE), TORCH)"
# Pattern of the first bytes -> (what the file is, a line of Python that writes its weights anew).
_WEIGHTS = {
    _MEMBER + rb"\.npy": (
        "an archive of np.savez",
        f"import numpy; {_SAVE}save_file(dict(numpy.load(FILE)), SAFE)",
    ),
    _MEMBER + rb"/data/weights/": (
        "a program of torch.export",
        "import torch; torch.save(torch.export.load(FILE).state_dict, TORCH)",
    ),
    rb"\x93NUMPY.*'\|O'": (
        "a Python object of np.save",
        f"import numpy; {_SAVE}save_file(numpy.load(FILE, allow_pickle=True).item(), SAFE)",
    ),
    rb"\x89HDF\r\n": (
        "an HDF5 file",
        f"import h5py; {_SAVE}d = {{}}; h5py.File(FILE).visititems(lambda name, x: d.update("
        "{name.replace('/', '.'): x[()]} if isinstance(x, h5py.Dataset) else {})); "
        "save_file(d, SAFE)",
    ),
    rb"[\x81-\x8f][\xa1-\xbf\xd9]|\xde..[\xa1-\xbf\xd9]": (
        "a msgpack file, as Flax writes",
        f"from flax import serialization, traverse_util; {_SAVE}save_file(traverse_util."
        "flatten_dict(serialization.msgpack_restore(open(FILE, 'rb').read()), sep='.'), SAFE)",
    ),
    rb"\x08[\x01-\x20]\x12.": (
        "an ONNX model",
        f"import onnx; {_SAVE}save_file({{x.name: onnx.numpy_helper.to_array(x) for x in "
        "onnx.load(FILE).graph.initializer}, SAFE)",
    ),
    rb"\x80.*joblib\.numpy_pickle": ("a pickle of joblib", _JOBLIB),
    rb"x[\x01\x5e\x9c\xda]": ("compressed by zlib, as joblib does", _JOBLIB),
    # Of protocols 0 and 1; `torch_file` reads later ones.
    rb"\(d|\(l?p\d|[\]}]q|ccollections\n": (NO_TORCH, RESAVE),
}
_OTHERS = {
    rb"version https://git-lfs": (
        "a Git LFS pointer, not the file it stands for",
        "Run `git lfs pull` in its repository, or download the file itself.",
    ),
    rb"(\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<\?xml)": (
        "a web page, probably an error or a login page",
        "Download the file itself.",
    ),
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar": (
        "an archive, as of tar or gzip",
        "Unpack it; load a PyTorch file older than 0.2 in PyTorch.",
    ),
    rb"GGUF|.{4}TFL3": (
        "weights for running elsewhere (GGUF or TFLite), rounded or renamed",
        "Take the PyTorch checkpoint that they were made of.",
    ),
    rb"\xff\xd8\xff|\x89PNG": ("an image", "Name the file of the weights."),
    rb"\0+$": ("begins with zeros, as an unfinished download does", "Download or copy it again."),
}


def what_it_is(head: bytes, name: str) -> tuple[str, str] | None:
    """Returns what a file is and what to do about it; None if it may be a checkpoint.

    Args:
      head: its first bytes, some hundreds.
      name: what messages call it.
    """
    for pattern, (what, line) in _WEIGHTS.items():
        if re.match(pattern, head, re.DOTALL):
            return what, recipe(line, name)
    for pattern, found in _OTHERS.items():
        if re.match(pattern, head, re.DOTALL):
            return found
    return None


def recipe(line: str, name: str) -> str:
    """Returns the advice to run a line of Python.

    Args:
      line: with FILE for the path of the file, SAFE and TORCH for that of the checkpoint to make.
      name: what messages call the file.
    """
    path = PurePath(name)
    names = {"FILE": path.name, "SAFE": f"{path.stem}.safetensors", "TORCH": f"{path.stem}.pt"}
    for word, to in names.items():
        line = line.replace(word, repr(to))
    return f"If you trust it, run `{line}` in Python; its arrays need the published names."
