"""What below an image folder is no image by its very name: it is skipped, counted and told of.

The lists decide which files have an `image_index`, and so the names of steps: a name that is added to them changes the
manifests of folders that have such files. All other names are tried, and what cannot be decoded is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping

from sae_ray.store.walking import Found

SUFFIXES = {
    "text and tables": "csv htm html json jsonl log md ndjson parquet rst rtf tex tsv txt xml yaml yml",
    "annotations, beside images or apart": "aae ann geojson jgw lif pgw pp3 prj srt tfw vtt wld xmp",
    "documents": "doc docx odp ods odt pdf ppt pptx xls xlsx",
    "video and sound": "3gp aac avi flac flv m4a m4v mkv mov mp3 mp4 mpeg mpg ogg ogv wav webm wma wmv",
    "archives": "7z bz2 dmg gz iso rar tar tbz tgz xz zip zst",
    "arrays and weights": "arrow ckpt feather h5 hdf5 mat npy npz onnx pickle pkl pt pth safetensors tfrecord",
    "settings and databases": "cfg conf db db-journal db-shm db-wal ini lmdb mdb sqlite sqlite3 toml",
    "check sums": "crc md5 sfv sha1 sha256 sha512",
    "programs": "bat cmd dll exe ipynb js py pyc sh so",
    "links and downloads": "desktop lnk torrent url webloc",
    "what has been begun": "aria2 crdownload download lock part partial swp tmp",
    "where a file came from, kept beside it by Windows": "identifier",
}
NAMES = {"_success", "authors", "changelog", "checksums", "citation", "contributors", "copying", "icon\r", "license"}
NAMES |= {"licence", "makefile", "manifest", "md5sums", "notice", "readme", "sha1sums", "sha256sums", "todo", "version"}
"""Of files without a suffix, in lower case: notes, check sums, what Spark and the Finder leave."""
FOLDERS = {"#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp"}
FOLDERS |= {"@__thumb", "__macosx", "__pycache__", "found.000", "lost+found", "network trash folder", "recycler"}
FOLDERS |= {"system volume information", "temporary items", "thevolumesettingsfolder"}
"""In lower case: thumbnails, bins and snapshots of file servers, and what systems and archives leave."""
ENDINGS = ("_$folder$", ":encryptable", "@synoeastream", "@synoresource")
"""Of whole names, in lower case: markers of folders in object stores, what Windows and Synology keep beside a file."""
TOLD = 8
"""Kinds that a line tells of."""

_SUFFIXES = frozenset(" ".join(SUFFIXES.values()).split())


def is_skipped_folder(name: str) -> bool:
    """Whether a folder of this name is left out, with all that is below it."""
    return name.lower() in FOLDERS


def skipped_as(found: Found) -> str | None:
    """The kind by which what was found is counted, if it is no image: `.txt`, `@eaDir/`; None if it may be one."""
    if found.kind == "linked folder" and not is_skipped_folder(found.name):
        return "link to a folder above it or listed already"
    if found.path[-1] == "/":
        return found.name + "/"
    if found.kind == "special file":
        return found.kind
    name = found.name.lower()
    if name in NAMES:
        return found.name.strip()
    if name.endswith(ENDINGS):
        return next(ending for ending in ENDINGS if name.endswith(ending))
    stem, _, suffix = name.rpartition(".")
    return f".{suffix}" if stem and suffix in _SUFFIXES else None


def skipped_line(skipped: Mapping[str, int]) -> str:
    """What was skipped, as `8 × .xml, 4 × .txt, 2 × @eaDir/`: the most frequent kinds first."""
    counts = sorted(skipped.items(), key=lambda one: (-one[1], one[0]))
    told = [f"{count:,} × {kind}" for kind, count in counts[:TOLD]]
    more = len(counts) - len(told)
    return ", ".join(told) + (f" and {more} other kinds" if more else "")
