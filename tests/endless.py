"""A folder of any number of images, which nobody has to write."""

from __future__ import annotations

from typing import Any

from pyarrow import fs


class Endless(fs.FileSystemHandler):
    """A file system with one folder of folders of images. None of them can be read."""

    def __init__(self, folder: str, n_folders: int, per_folder: int):
        self.folder, self.n_folders, self.per_folder = folder, n_folders, per_folder

    def get_type_name(self) -> str:
        return "endless"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [fs.FileInfo(path, fs.FileType.Directory) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        folder = selector.base_dir
        if folder == self.folder:
            names = (f"{folder}/n{number:08}" for number in range(self.n_folders))
            return [fs.FileInfo(name, fs.FileType.Directory) for name in names]
        start = f"{folder}/{folder.rpartition('/')[2]}_"
        files = range(self.per_folder)
        return [fs.FileInfo(f"{start}{n}.JPEG", fs.FileType.File, size=100_000 + n) for n in files]

    def unused(self, *given: Any) -> Any:
        raise NotImplementedError

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = move = copy_file = unused
    open_input_stream = open_input_file = open_output_stream = open_append_stream = unused
