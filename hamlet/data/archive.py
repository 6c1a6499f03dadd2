"""Fetch an archive and unpack it safely: what comes from a network is not trusted before it is checked."""

import http.client
import os
import shutil
import stat
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from hamlet.data.dataset import DataError

BLOCK = 1 << 20


def download(url: str, target: Path, *, max_bytes: int = 1 << 30, timeout: float = 30) -> None:
    """Fetch ``url`` to ``target``; the name appears only when the announced length is there.

    A broken transfer starts again from nothing on the next call (GitHub's archives are made on the fly and
    cannot be resumed). Raises OSError for the network, DataError for a short or oversized file.
    """
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{url}: only http and https are fetched")
    partial = target.with_name(target.name + ".partial")
    request = urllib.request.Request(url, headers={"User-Agent": "hamlet-retrieval"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response, partial.open("wb") as out:
            announced = response.headers.get("Content-Length")
            total, done = int(announced) if announced else None, 0
            bar = tqdm(total=total, desc=f"fetching {target.name}", unit="B", unit_scale=True, disable=None)
            with bar:
                while block := response.read(BLOCK):
                    done += len(block)
                    if done > max_bytes:
                        raise DataError(f"{url}: more than {max_bytes} bytes")
                    out.write(block)
                    bar.update(len(block))
        if total is not None and done != total:
            raise DataError(f"{url}: broken off after {done} of {total} bytes; run again")
        os.replace(partial, target)
    except http.client.HTTPException as error:
        raise DataError(f"{url}: broken off ({error!r}); run again") from error
    finally:
        partial.unlink(missing_ok=True)


def _checked(member: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    """Relative path of a member; refuses what could write outside the target or is not a plain file."""
    path, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
    windows = "\\" in member.filename or ":" in member.filename
    if not path.parts or path.is_absolute() or ".." in path.parts or windows:
        raise DataError(f"{archive.name}: unsafe path {member.filename!r}; nothing was unpacked")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{archive.name}: {member.filename!r} is a link or a device; nothing was unpacked")
    return path


def unpack(
    archive: Path, target: Path, *, strip: int = 0, keep: tuple[str, ...] = ("",), limit: int = 2 << 30
):
    """Unpack a zip into the new folder ``target``, dropping ``strip`` leading folders of each name.

    Only members whose remaining path starts with one of ``keep`` are written. Every member is checked before
    the first byte is written: absolute paths, "..", links, devices, more than ``limit`` bytes in all, and two
    members of one name are refused with DataError.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            plan: dict[PurePosixPath, zipfile.ZipInfo] = {}
            for member in source.infolist():
                path = PurePosixPath(*_checked(member, archive).parts[strip:])
                if member.is_dir() or not str(path).startswith(keep):
                    continue
                if path in plan:
                    raise DataError(f"{archive.name}: {member.filename!r} occurs twice; nothing was unpacked")
                plan[path] = member
            if (total := sum(member.file_size for member in plan.values())) > limit:
                raise DataError(f"{archive.name}: {total} bytes unpacked, more than {limit}; refused")
            target.mkdir(parents=True)
            for path, member in tqdm(plan.items(), desc=f"unpacking {archive.name}", disable=None, delay=1):
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as packed, (target / path).open("xb") as out:
                    shutil.copyfileobj(packed, out, BLOCK)  # zipfile stops at file_size and checks the CRC
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{archive.name}: not a sound zip archive ({error}); delete it and run again"
        ) from error
