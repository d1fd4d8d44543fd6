"""JPEGs that a GPU decodes, and those that are left to Pillow. Where there is no GPU, Pillow decodes in its place."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sae_ray.encoders import load_preprocess, on_gpu
from sae_ray.encoders.on_gpu import check_decoder, decoded_on_gpu
from sae_ray.errors import UsageError
from sae_ray.images.jpegs import ORIENTATION, usual_jpeg
from sae_ray.images.part import DecodedPart, Preparation, decode_part
from sae_ray.store.files import Folder
from sae_ray.world.write import MODELS

BROKEN = b"\xff\xd8\xff\xe0broken\xff\xd9"


def photograph(size: tuple[int, int]) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [np.sin(x / 31 + y / 47), np.cos(y / 23), np.sin((x + y) / 37)]
    return Image.fromarray(np.rint(np.stack(waves, 2) * 110 + 125).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", orientation: int = 1, **settings) -> bytes:
    out, exif = BytesIO(), Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(out, format, exif=exif, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Usual ones, lying in every way; and others."""
    wide, tall = photograph((160, 120)), photograph((90, 200))
    usual = {f"usual-{number}.jpg": encoded(wide, orientation=number) for number in range(1, 9)}
    usual |= {f"usual-4{a}{b}.jpg": encoded(tall, subsampling=f"4:{a}:{b}") for a, b in ((4, 4), (2, 2), (2, 0))}
    return usual | {
        "cmyk.jpg": encoded(wide.convert("CMYK")),
        "grey.jpg": encoded(wide.convert("L")),
        "progressive.jpg": encoded(tall, orientation=6, progressive=True),
        "rgb.jpg": encoded(wide, keep_rgb=True),
        "png.jpg": encoded(wide, "PNG"),
        "zeros.jpg": usual["usual-2.jpg"] + b"\0\0",
        "cut.jpg": usual["usual-1.jpg"][:-200],
        "broken.jpg": BROKEN,
        "empty.jpg": b"",
    }


def by_pillow(files: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """As nvJPEG: all or none, and not turned."""
    try:
        images = [Image.open(BytesIO(file.tobytes())).convert("RGB") for file in files]
    except OSError as error:
        raise RuntimeError("bad JPEG") from error
    if any(image.size == (33, 44) for image in images):
        raise RuntimeError("not supported")
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device) for image in images]


@pytest.fixture
def decoding_device(device, monkeypatch) -> torch.device:
    if device == "cpu":
        monkeypatch.setattr(on_gpu, "_decode", by_pillow)
    return torch.device(device)


def test_the_content_alone_decides_who_decodes_a_file(files):
    found = {name: usual_jpeg(data) for name, data in files.items()}
    assert {name for name, jpeg in found.items() if jpeg} == {
        name for name in files if name.startswith(("usual", "zeros"))
    }
    assert [found[f"usual-{number}.jpg"].orientation for number in range(1, 9)] == list(range(1, 9))


def test_a_part_from_a_gpu_has_the_images_and_rejects_of_the_exact_one(files, tmp_path: Path, decoding_device):
    files = files | {"unsupported.jpg": encoded(photograph((33, 44)))}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names, folder = sorted(files), Folder(tmp_path)
    preparations = [Preparation(load_preprocess(str(MODELS / "clip")))] * 2
    exact = decode_part(folder, names, preparations)
    part = decode_part(folder, names, preparations, for_gpu=True)
    finished, pixels = decoded_on_gpu(part, names, preparations, [(56, 56)] * 2, decoding_device)
    assert finished.accepted.tolist() == exact.accepted.tolist()
    assert finished.rejects == exact.rejects
    assert len(exact.rejects) == 3
    for ours, theirs in zip(pixels, exact.pixels, strict=True):
        assert ours.device.type == decoding_device.type
        for place, (one, other) in enumerate(zip(ours.cpu().numpy(), theirs, strict=True)):
            name = names[exact.accepted[place]]
            difference = np.abs(one.astype(int) - other)
            if name.startswith(("usual", "zeros")):
                assert difference.mean() < 1, name
                assert difference.max() <= (2 if decoding_device.type == "cpu" else 16), name
            elif name != "unsupported.jpg" or decoding_device.type == "cpu":
                assert difference.max() == 0, name
    [alone] = [names.index("usual-6.jpg")]
    part = decode_part(folder, names[alone : alone + 1], preparations, for_gpu=True)
    _, [again, _] = decoded_on_gpu(part, names[alone:], preparations, [(56, 56)] * 2, decoding_device)
    assert torch.equal(again[0], pixels[0][exact.accepted.tolist().index(alone)])


def test_a_file_that_neither_decodes_is_a_reject(tmp_path: Path, decoding_device):
    """In its turn, whoever noticed."""
    data = encoded(photograph((80, 60)))
    names, preparations = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], [Preparation(load_preprocess(str(MODELS / "clip")))]
    for name in names:
        (tmp_path / name).write_bytes(BROKEN if name == "c.jpg" else data)
    part = decode_part(Folder(tmp_path), names, preparations, for_gpu=True)
    part.jpegs[1] = part.jpegs[1]._replace(data=part.jpegs[1].data[:100])
    finished, [pixels] = decoded_on_gpu(part, names, preparations, [(56, 56)], decoding_device)
    assert finished.accepted.tolist() == [0, 3]
    assert len(pixels) == 2
    assert [name for name, _ in finished.rejects] == ["b.jpg", "c.jpg"]


def a_camera_s(sizes: Sequence[tuple[int, int]], folder: Path) -> tuple[DecodedPart, list[str], list[Preparation]]:
    """A part of images of these sizes, by their headers."""
    names, preparation = [f"{n:03}.jpg" for n in range(len(sizes))], Preparation(load_preprocess(str(MODELS / "clip")))
    for name in names:
        (folder / name).write_bytes(encoded(photograph((40, 30))))
    part = decode_part(Folder(folder), names, [preparation], for_gpu=True)
    jpegs = {place: part.jpegs[place]._replace(size=size) for place, size in enumerate(sizes)}
    return part._replace(jpegs=jpegs), names, [preparation]


def test_a_gpu_decodes_as_many_files_at_once_as_it_has_room_for(tmp_path: Path, monkeypatch):
    camera, usual, huge = (6000, 4000), (500, 375), (15_000, 10_000)
    part, names, preparations = a_camera_s([camera] * 5 + [huge] + [usual] * 100, tmp_path)
    at_once = []

    def decode(files: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        at_once.append(len(files))
        return by_pillow(files, device)

    monkeypatch.setattr(on_gpu, "_decode", decode)
    finished, [pixels] = decoded_on_gpu(part, names, preparations, [(56, 56)], torch.device("cpu"))
    assert at_once == [2, 2, 1, 1, 64, 36]
    assert len(finished.accepted) == len(pixels) == 106


def test_a_gpu_without_room_for_an_image_names_the_setting(tmp_path: Path, monkeypatch):
    def decode(files: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 429.00 MiB")

    part, names, preparations = a_camera_s([(500, 375), (15_000, 10_000)], tmp_path)
    monkeypatch.setattr(on_gpu, "_decode", decode)
    words = r"extraction\.pixels = 'gpu': the memory of cpu on .* up to 15000 x 10000 pixels .* choose exact or"
    with pytest.raises(UsageError, match=words):
        decoded_on_gpu(part, names, preparations, [(56, 56)], torch.device("cpu"))


def test_a_torchvision_that_cannot_decode_on_gpus_is_named():
    with pytest.raises(UsageError, match=r"extraction\.pixels = 'gpu': torchvision cannot decode .* or choose exact"):
        check_decoder(torch.device("cuda", 99))  # whatever torchvision was built with, no machine has it


@pytest.mark.gpu
def test_the_decoder_of_this_machine_works():
    check_decoder(torch.device("cuda"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_by_pillow(orientation: int):
    image = photograph((5, 3))
    stored = Image.open(BytesIO(encoded(image, "PNG", orientation)))
    upright = np.array(ImageOps.exif_transpose(stored))
    found = on_gpu.turned(torch.from_numpy(np.array(image)).permute(2, 0, 1), orientation)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), upright)
