"""What below an image folder is no image by its very name: it is skipped, counted and told of.

The lists decide which files have an `image_index`, and so the names of steps: a name that is added to them changes the
manifests of folders that have such files. All other names are tried, and what cannot be decoded is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sae_ray.store.walking import Found

SUFFIXES = {
    "text and tables": "csv htm html json json5 jsonl log md ndjson nfo orc parquet properties rst rtf tab tex "
    "tsv txt xhtml xml xsd xsl yaml yml",
    "annotations, beside images or apart": "aae ann dop geojson gpx jgw kml kmz lif lrcat lrprev names pbtxt pgw "
    "pp3 prj pts srt tfw vtt wld xmp",
    "the other files of maps": "bpw cpg dbf gfw j2w jpgw pngw shp shx tifw",
    "documents": "bib doc docx epub key numbers odp ods odt pages pdf ppt pptx xls xlsm xlsx",
    "video and sound": "3g2 3gp aac aif aiff amr avi f4v flac flv lrv m2ts m2v m4a m4v mid mkv mov mp3 mp4 mpeg "
    "mpg mts mxf ogg ogv opus vob wav webm wma wmv",
    "archives": "7z bz2 cab deb dmg gz iso jar lz4 lzma rar rpm tar tbz tbz2 tgz txz tzst whl xz zip zst",
    "arrays and weights": "arrow avro beton bin ckpt feather gguf h5 h5ad hdf5 idx joblib keras lst mat msgpack "
    "npy npz onnx pb pck pickle pkl pt pth rec safetensors tfrecord tflite",
    "three dimensions": "fbx glb gltf las laz mtl obj ply stl",
    "settings and databases": "cfg conf db db-journal db-shm db-wal dbx dvc env ini lmdb mdb plist sql sqlite "
    "sqlite3 toml",
    "check sums and signatures": "asc crc gpg md5 md5sum sfv sha1 sha256 sha256sum sha512 sig",
    "programs": "bat cmd cpp css cu dll dylib exe go hpp ipynb java jl js jsx mjs msi pl ps1 py pyc rb rmd rs sh "
    "so ts tsx wasm",
    "links, mail and downloads": "desktop eml ics lnk torrent url vcf webloc",
    "what has been begun": "!qb !ut aria2 bc! crdownload download filepart incomplete lock opdownload part "
    "partial swo swp temp tmp unfinished ytdl",
    "where a file came from, kept beside it by Windows": "identifier",
}
NAMES = (
    "_common_metadata _metadata _success authors changelog changes checksums citation contributors copying copyright "
    "dockerfile history install licence license makefile manifest md5sum md5sums news notice readme sha1sums sha256sum "
    "sha256sums sha512sums thanks todo unlicense version"
)
"""Of files without a suffix, in lower case: notes, check sums, what Spark leaves."""
FOLDERS = (
    "#recycle, #snapshot, $recycle.bin, @__thumb, @eadir, @recently-snapshot, @recycle, @sharebin, @tmp, __macosx, "
    "__pycache__, _gsdata_, _temporary, _vti_cnf, captureone, lost+found, lost.dir, network trash folder, "
    "node_modules, recycler, site-packages, system volume information, temporary items, "
    "thefindbycontentfolder, thevolumesettingsfolder, ~snapshot"
)
"""In lower case: thumbnails, bins and snapshots of file servers, and what systems and programs leave."""
TOLD = 8
"""Kinds that a line tells of."""

_SUFFIXES = frozenset(" ".join(SUFFIXES.values()).split())
_NAMES = frozenset((*NAMES.split(), "icon\r"))
_FOLDERS = frozenset(FOLDERS.split(", "))
_ODD_FOLDER = re.compile(r"found\.\d{3}|.*\.lrdata")
_ODD_NAME = re.compile(r"^(_committed_|_started_)\d|(_\$folder\$|:encryptable|:afp_\w+|:com\.apple\.\w+|@syno\w+)$")
"""In lower case: what Spark and object stores leave, and what Windows, macOS and Synology keep beside a file."""


def is_skipped_folder(name: str) -> bool:
    """Whether a folder of this name is left out, with all that is below it."""
    return name.lower() in _FOLDERS or _ODD_FOLDER.fullmatch(name.lower()) is not None


def skipped_as(found: Found) -> str | None:
    """The kind by which what was found is counted, if it is no image: `.txt`, `@eaDir/`; None if it may be one."""
    if found.kind == "linked folder" and not is_skipped_folder(found.name):
        return "link to a folder above it or listed already"
    if found.path[-1] == "/":
        return found.name + "/"
    if found.kind == "special file":
        return found.kind
    name = found.name.lower().rstrip("~")  # which editors add to what they have changed
    if name in _NAMES:
        return found.name.strip()
    if odd := _ODD_NAME.search(name):
        return odd[1] or odd[2]
    stem, _, suffix = name.rpartition(".")
    return f".{suffix}" if stem and suffix in _SUFFIXES else None


def skipped_line(skipped: Mapping[str, int]) -> str:
    """What was skipped, as `8 × .xml, 4 × .txt, 2 × @eaDir/`: the most frequent kinds first."""
    counts = sorted(skipped.items(), key=lambda one: (-one[1], one[0]))
    told = [f"{count:,} × {kind}" for kind, count in counts[:TOLD]]
    more = len(counts) - len(told)
    return ", ".join(told) + (f" and {more} other kinds" if more else "")
