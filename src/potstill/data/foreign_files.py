"""What a file is that is no image of the formats, for messages: most are a download or an export that went wrong."""

_TEXT_HEAD = 1024  # bytes in which a text file shows what it is

# First bytes -> what it is, and what to do.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file; fetch the files with: git lfs pull"),
    (b"%PDF", "a PDF document; export its pages as images"),
    (b"\xff\x0a", "a JPEG XL image; convert it"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image; convert it"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image; convert it"),
    (b"II*\0\x10\0\0\0CR", "a camera's raw file (CR2); develop it to JPEG or TIFF first"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (RAF); develop it to JPEG or TIFF first"),
    (b"IIRO", "a camera's raw file (ORF); develop it to JPEG or TIFF first"),
    (b"IIRS", "a camera's raw file (ORF); develop it to JPEG or TIFF first"),
    (b"IIU\0", "a camera's raw file (RW2); develop it to JPEG or TIFF first"),
    (b"8BPS", "a Photoshop document; export it"),
    (b"PK\3\4", "a zip archive (or an Office document); unpack it"),
    (b"PK\5\6", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (b"BZh", "a bzip2 file; unpack it"),
    (b"\xfd7zXZ\0", "an xz file; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video; export frames as images"),
    (b"\0\0\1\0", "a Windows icon; convert it"),
    (b"\0\5\x16\7", "an AppleDouble file (macOS keeps attributes in it); delete it"),
    (b"\x93NUMPY", "a NumPy array; save it as PNG or TIFF"),
    (b"\x89HDF", "an HDF5 file; export its arrays as images"),
    (b"SIMPLE  =", "a FITS file; export it as TIFF"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image; convert it"),
    (b"#?RADIANCE", "a Radiance HDR image; convert it"),
    (b"DDS ", "a DDS texture; convert it"),
    (b"%!PS", "a PostScript file; convert it"),
    (b"\xd0\xcf\x11\xe0", "an old Office document or Thumbs.db"),
    (b"SQLite format 3", "an SQLite data base"),
    (b"ID3", "a sound file"),
    (b"\x7fELF", "a program"),
)
_ISO_BRANDS = {b"crx ": "a camera's raw file (CR3); develop it to JPEG or TIFF first", b"jxl ": "a JPEG XL image"}


def foreign(content: bytes) -> str:
    """The end of a sentence that says what a file is, or how it begins."""
    found = _what(content)
    if found is not None:
        return f", but {found}"
    return f" (it starts with {content[:8].decode('latin-1')!a})"


def _what(content: bytes) -> str | None:
    for magic, what in _MAGIC:
        if content.startswith(magic):
            return what
    if content[4:8] == b"ftyp":
        return _ISO_BRANDS.get(content[8:12], "a video (MP4 or MOV); export frames as images")
    if content[4:8] in (b"moov", b"mdat", b"wide", b"free"):
        return "a video (MOV); export frames as images"
    if content[:4] == b"RIFF":
        return {b"AVI ": "an AVI video; export frames as images", b"WAVE": "a sound file"}.get(content[8:12])
    if content[128:132] == b"DICM":
        return "a DICOM file; export its pixels as 16-bit PNG or TIFF"
    if content[257:262] == b"ustar":
        return "a tar archive; unpack it, or give it as shards (NAME.tar)"
    if not content.strip(b"\0"):
        return "a file of zero bytes alone; most likely a copy that broke off"
    return _text(content[:_TEXT_HEAD])


def _text(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "a text file (UTF-16)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page; most likely a download that ended at a login or an error page"
    if b"<svg" in text:
        return "an SVG drawing; export it as PNG"
    if b"<html" in text:
        return "an HTML page; most likely a download that ended at a login or an error page"
    if text.startswith(b"<?xml") or (text.startswith(b"<") and b"<error" in text):
        return "an XML text; most likely a storage's error message in place of the image"
    if text.startswith((b"{", b"[")) and b'"' in text:
        return "a JSON text; most likely a server's error message in place of the image"
    try:
        plain = head.decode("utf-8", "strict" if len(head) < _TEXT_HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    words = sum(each.isprintable() or each.isspace() for each in plain)
    return "a text file" if plain and words == len(plain) and len(plain) > 3 else None
