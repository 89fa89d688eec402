"""Preparing a data set of TFDS without TensorFlow, with a network or from files put there by hand.

TFDS needs TensorFlow for three things here: to encode NumPy images, which Pillow does instead, to
open files, and to convert some pictures of ImageNet, which stay as they are: Pillow reads them. Its
builders stay as they are.
"""

import contextlib
import functools
import glob
import http.client
import importlib.util
import io
import os
import shutil
import tempfile
import threading
import types
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.core import download, utils
from tensorflow_datasets.core.download import checksums, download_manager
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.core.utils import lazy_imports_utils

from flax_resnet.errors import InputError, short_reason
from flax_resnet.progress import say, shows_bars, warn

# How long a server may take to answer before there is no network.
_SECONDS_TO_ANSWER = 8.0

# How people name a data folder, in Python and on the command line.
BY_WHAT = "$TFDS_DATA_DIR or data_dir (train.py: --config.data_dir=DIR, others: --data_dir=DIR)"

# Of the files that are missing, so many are named.
_FILES_NAMED = 5


def prepare(builder: Any) -> None:
    """Has TFDS download and prepare a data set, as ArrayRecord files.

    A file in `downloads/manual/` or `downloads/manual/NAME/` of the data folder, under the name
    that it has where TFDS downloads it, is taken instead of a download.

    Args:
      builder: a tfds.core.DatasetBuilder.

    Raises:
      InputError: if that fails; it says which files are missing, and where to put them.
    """
    name, folder = builder.name, Path(builder.data_dir_root)
    say(f"preparing {name} in {folder} ...")
    if not shows_bars():
        tfds.disable_progress_bar()
    try:
        with (
            _removed_if_empty(folder, folder / "downloads", Path(builder.data_path).parent),
            _scratch_folder(folder / "downloads") as extracted,
            _without_tensorflow(),
            contextlib.redirect_stdout(io.StringIO()),  # TFDS prints where it writes to
        ):
            # What TFDS would keep here it would also take for another file of the same name.
            config = tfds.download.DownloadConfig(extract_dir=extracted)
            builder.download_and_prepare(file_format="array_record", download_config=config)
    except InputError:
        raise
    except _MissingFilesError as error:
        raise InputError(str(error)) from None
    except ImportError as error:
        needed = "TensorFlow" if error.name == "tensorflow" else error.name or short_reason(error)
        raise InputError(
            f"TFDS needs {needed} to prepare {name}: run `tfds build {name} "
            "--file_format=array_record` where it is installed, and name the folder by "
            f"{BY_WHAT}"
        ) from error
    except Exception as error:  # of the disk, the download, its checksum, the examples
        wrong = isinstance(error, download_manager.NonMatchingChecksumError)
        reason = "a wrong checksum: " * wrong + short_reason(error)
        raise InputError(f"{name} cannot be prepared in {folder}: {reason}") from error


@contextlib.contextmanager
def _removed_if_empty(*folders: Path) -> Iterator[None]:
    """Takes back folders that were made within, if nothing is in them."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in reversed(new):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _scratch_folder(beside: Path) -> Iterator[str]:
    beside.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="extracted-", dir=beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# What TFDS takes from TensorFlow.

_CONVERSIONS = ("jpeg_cmyk_to_rgb", "png_to_jpeg")  # of tensorflow_datasets.core.utils


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Within, TFDS encodes images by Pillow, opens files by Python, and downloads as `_Downloads`.

    Raises:
      InputError: if this TFDS is built in another way.
    """
    lazy = lazy_imports_utils.tensorflow
    hooks = (
        (image_feature._ImageEncoder, "_encode_image"),
        (download, "DownloadManager"),
        (download.DownloadManager, "_download"),
        (download.DownloadManager, "_get_manually_downloaded_path"),
        (type(lazy), "_module"),
        *((utils, name) for name in _CONVERSIONS),
    )
    if missing := [name for where, name in hooks if not hasattr(where, name)]:
        raise InputError(
            f"TFDS {tfds.__version__} lacks {', '.join(missing)}, so that data sets cannot be "
            "prepared with it: install tensorflow-datasets 4.9.10"
        )
    with contextlib.ExitStack() as stack:
        encoder = image_feature._ImageEncoder
        stack.enter_context(mock.patch.object(encoder, "_encode_image", _encode_by_pillow))
        stack.enter_context(mock.patch.object(download, "DownloadManager", _Downloads))
        if not importlib.util.find_spec("tensorflow"):
            stack.enter_context(mock.patch.dict(vars(lazy), {"_module": _TENSORFLOW}))
            for name in _CONVERSIONS:
                stack.enter_context(mock.patch.object(utils, name, bytes))
        yield


def _encode_by_pillow(encoder: Any, image: np.ndarray) -> bytes:
    """The image, [H, W, C] of uint8 or [H, W, 1] of uint16, as PNG, whatever the feature asks for.

    JPEG would lose what the array has.
    """
    image_feature._validate_np_array(image, shape=encoder.shape, dtype=encoder.np_dtype)
    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _open(path: str | os.PathLike[str], mode: str = "r") -> Any:
    """tf.io.gfile.GFile: text is UTF-8, and its lines end with \\n alone."""
    return open(path, mode) if "b" in mode else open(path, mode, encoding="utf-8", newline="\n")


def _copy(source: str, target: str | os.PathLike[str]) -> None:
    if "://" in source:
        raise NotImplementedError(source)  # whereupon TFDS downloads it
    shutil.copyfile(source, target)


def _text(content: str | bytes) -> str:
    return content.decode() if isinstance(content, bytes) else content


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


class _Module(types.SimpleNamespace):
    """Some functions of a module of TensorFlow."""

    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError(f"TensorFlow's {name} is not here", name="tensorflow")


# The little that TFDS's builders of image data sets use: to read files.
_TENSORFLOW = _Module(
    io=_Module(
        gfile=_Module(
            GFile=_open,
            copy=_copy,
            exists=os.path.exists,
            glob=lambda pattern: sorted(glob.glob(os.fspath(pattern))),
            isdir=os.path.isdir,
            listdir=lambda folder: sorted(os.listdir(folder)),
            makedirs=functools.partial(os.makedirs, exist_ok=True),
            walk=os.walk,
        )
    ),
    compat=_Module(as_text=_text, as_str=_text, as_bytes=_bytes),
    errors=_Module(
        NotFoundError=FileNotFoundError,
        InvalidArgumentError=ValueError,
        UnimplementedError=NotImplementedError,
    ),
)


# Downloads.


class _Downloads(download.DownloadManager):
    """TFDS's own, with another way of taking files that were put there by hand.

    TFDS takes those alone whose checksum it knows, and stops at any other of that name, also one
    of another data set: MNIST, Fashion-MNIST and KMNIST have the same names.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._missing: list[tuple[str, Path]] = []
        self._answers: dict[str, bool] = {}
        self._has_warned = False

    def _get_manually_downloaded_path(self, expected_url_info: Any) -> None:
        """Nothing: `_download` looks for it, once there is no earlier download."""

    def _download(self, resource: Any) -> Any:
        """A promise of the path, as in TFDS."""
        promise = lazy_imports_utils.promise.Promise
        url = resource.url
        try:
            path, found = self._put_there(url)
        except OSError as error:
            return promise.reject(error)
        if found:
            self._recorded_url_infos[url] = found
            return promise.resolve(epath.Path(path))
        server = urllib.parse.urlsplit(url).netloc
        if server not in self._answers:
            self._answers[server] = reachable(url)
        if not self._answers[server]:
            self._missing.append((url, path))
            # TFDS has asked for all of a builder's files before it waits for the first.
            return promise.reject(
                _MissingFilesError(str(self._dataset_name), self._download_dir, self._missing)
            )
        return super()._download(resource)

    def _put_there(self, url: str) -> tuple[Path, Any]:
        """Where the file of a URL is to be put, and its size and checksum if it is there."""
        expected = self._url_infos.get(url)
        name = (expected and expected.filename) or _name_in(url)
        manual = Path(self._manual_dir or self._download_dir / "manual")
        places = [manual / str(self._dataset_name) / name, manual / name]
        others = {info.checksum for key, info in self._url_infos.items() if key != url}
        for path in filter(Path.is_file, places):
            found = checksums.compute_url_info(path)
            if expected is None or found == expected:
                return path, found
            if found.checksum not in others:
                if not self._has_warned:
                    warn(
                        f"{path} is not byte for byte the published file; {self._dataset_name} is "
                        "made of what it holds, and of others like it"
                    )
                self._has_warned = True
                return path, found
        return places[0] if places[1].exists() else places[1], None


class _MissingFilesError(Exception):
    """Files that can neither be downloaded nor are there; `missing` may still grow."""

    def __init__(self, name: str, downloads: Any, missing: list[tuple[str, Path]]):
        super().__init__()
        self._name, self._folder, self._missing = name, Path(downloads).parent, missing

    def __str__(self) -> str:
        count = len(self._missing)
        if count == 1:
            ((url, path),) = self._missing
            what, put = f"{url} cannot be reached", f"put that file at {path}"
        else:
            manual = self._folder / "downloads" / "manual"
            files = [f"{path.relative_to(manual)} ({url})" for url, path in self._missing]
            more = f" and {count - _FILES_NAMED} more" if count > _FILES_NAMED else ""
            what = f"the {count} files that it is made of cannot be downloaded"
            put = f"put into {manual} {', '.join(files[:_FILES_NAMED])}{more}"
        return (
            f"no data and no network: {self._name} is not in {self._folder}, and {what}. Either "
            f"name a folder that has it by {BY_WHAT}, or {put}, or train on data that needs no "
            "download with --config configs/digits_resnet8.py"
        )


def _name_in(url: str) -> str:
    """The last part of the path in a URL."""
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "download"


def reachable(url: str) -> bool:
    """Whether a server answers at all."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, http.client.HTTPException, ValueError):  # the last of a proxy's address
            pass

    # A daemon thread, because looking the name up ignores every timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_ANSWER)
    return bool(answers)
