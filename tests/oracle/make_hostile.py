"""Damaged and malicious weight files, in tests/fixtures/hostile, assembled byte by byte.

index.json says for each file what is wrong with it and what a reader must do: "refuse" (an
error), "either" (refuse, or skip the odd part and read the tensor `weight`) or "read" (the
controls). No reader may run the payload, which would create a file named PAYLOAD_MARK in the
working directory, nor need more than a few MB of memory for any of them. Nothing here is ever
unpickled by this script but the controls.
"""

import io
import re
import shutil
import struct
import zipfile

import torch
from safetensors.torch import save

from oracle_common import FIXTURES, write_json

FOLDER = FIXTURES / "hostile"
PAYLOAD_MARK = "latile-hostile-payload-ran"
COMMAND = f"touch {PAYLOAD_MARK}"
VALUES = struct.pack("<6f", 1, 2, 3, 4, 5, 6)


# A little assembler for pickles

def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -2**31 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def ints(*values):
    return b"(" + b"".join(number(v) for v in values) + b"t"


def reference(module, name):
    return f"c{module}\n{name}\n".encode()


def call(module, name, *arguments):
    return reference(module, name) + b"(" + b"".join(arguments) + b"tR"


def storage(key="0", elements=6, dtype="FloatStorage", tag="storage"):
    return b"(" + text(tag) + reference("torch", dtype) + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(where=None, offset=0, shape=(2, 3), stride=(3, 1)):
    return call("torch._utils", "_rebuild_tensor_v2", storage() if where is None else where, number(offset),
                ints(*shape), ints(*stride), b"\x89", reference("collections", "OrderedDict") + b")R")


def pickled(*pairs):
    """A pickle of {"state_dict": {name: value, ...}} from (name, value bytes)."""
    inner = b"}(" + b"".join(text(n) + v for n, v in pairs) + b"u"
    return b"\x80\x02}" + text("state_dict") + inner + b"s."


def with_extra(extra):
    """A sound tensor and, beside it, `extra`."""
    return pickled(("weight", tensor()), ("extra", extra))


def archive(pickle, storages=None, compression=zipfile.ZIP_STORED, prefix="archive"):
    """A torch zip: data.pkl, one file for each storage, version."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as zipped:
        entries = {"data.pkl": pickle, "byteorder": b"little",
                   **{f"data/{k}": v for k, v in (storages or {"0": VALUES}).items()}, "version": b"3\n"}
        for name, data in entries.items():
            zipped.writestr(zipfile.ZipInfo(f"{prefix}/{name}", (1980, 1, 1, 0, 0, 0)), data, compress_type=compression)
    return out.getvalue()


def patch(data, at, replacement):
    return data[:at] + replacement + data[at + len(replacement):]


def directory_at(data):
    """Offset of the first entry of the central directory."""
    return struct.unpack_from("<I", data, data.rindex(b"PK\x05\x06") + 16)[0]


def laughs(levels=40):
    """A list that holds itself ten times over, forty levels deep: 10^40 elements when walked."""
    out = b"]" + b"q\x00" + text("ha") + b"a0"
    out += b"h\x00"
    for level in range(1, levels):
        out += b"q" + bytes([level]) + b"0" + b"](" + (b"h" + bytes([level])) * 10 + b"e"
    return out


def doubling(levels=60):
    """A tuple of the one before it twice, by DUP: 2^60 leaves."""
    return text("ha") + b"2\x86" * levels


def bomb():
    """A deflated pickle of 16 MB of nested lists in a few kB."""
    return archive(with_extra(b"]" * (1 << 23) + b"0" * ((1 << 23) - 1)), compression=zipfile.ZIP_DEFLATED)


def legacy():
    """The container from before zip (torch < 1.6): magic number, protocol, system info, pickle, raw storages."""
    out = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.arange(1.0, 7.0).reshape(2, 3)}}, out, _use_new_zipfile_serialization=False)
    # The storage's name is its address; any name of the same length does.
    return re.sub(rb"(?<=\x00\x00\x00)\d{10,}", lambda m: b"7" * len(m[0]), out.getvalue())


def pickles():
    """(name, what, must, pickle): all inside an otherwise sound archive."""
    system = call("os", "system", text(COMMAND))
    eval_ = text(f"__import__('os').system('{COMMAND}')")
    far = 2**62
    yield "control", "nothing: a sound file", "read", with_extra(number(1))
    yield "control-v3", "nothing: UntypedStorage and _rebuild_tensor_v3", "either", with_extra(
        call("torch._utils", "_rebuild_tensor_v3",
             b"(" + text("storage") + reference("torch.storage", "UntypedStorage") + text("0") + text("cpu") + number(24) + b"tQ",
             number(0), ints(2, 3), ints(3, 1), b"\x89", reference("collections", "OrderedDict") + b")R",
             reference("torch", "float32")))
    yield "os-system", "calls os.system", "refuse", with_extra(system)
    yield "posix-system", "calls posix.system", "refuse", with_extra(call("posix", "system", text(COMMAND)))
    yield "subprocess", "calls subprocess.Popen", "refuse", with_extra(
        call("subprocess", "Popen", b"(" + text("touch") + text(PAYLOAD_MARK) + b"l"))
    yield "eval", "calls builtins.eval", "refuse", with_extra(call("builtins", "eval", eval_))
    yield "exec-python2", "calls __builtin__.execfile under its Python 2 name", "refuse", with_extra(
        call("__builtin__", "execfile", text(PAYLOAD_MARK)))
    yield "stack-global", "names os.system by STACK_GLOBAL", "refuse", (
        b"\x80\x04}" + text("state_dict") + b"}" + text("extra") + text("os") + text("system") + b"\x93("
        + text(COMMAND) + b"tRss.")
    yield "inst", "calls os.system by INST", "refuse", with_extra(b"(" + text(COMMAND) + b"ios\nsystem\n")
    yield "obj", "calls os.system by OBJ", "refuse", with_extra(b"(" + reference("os", "system") + text(COMMAND) + b"o")
    yield "newobj", "makes subprocess.Popen by NEWOBJ", "refuse", with_extra(
        reference("subprocess", "Popen") + b"(" + text(COMMAND) + b"t\x81")
    yield "build", "sets state on an object of code by BUILD", "refuse", with_extra(
        call("types", "CodeType") + b"}" + text("co_code") + text("x") + b"sb")
    yield "getattr-chain", "reaches os.system through getattr on an allowed module", "refuse", with_extra(
        call("builtins", "getattr", reference("torch", "os"), text("system")))
    yield "dotted-global", "reaches os through the attributes of an allowed module", "refuse", (
        b"\x80\x04}" + text("state_dict") + b"}" + text("extra") + text("torch.serialization") + text("os.system")
        + b"\x93(" + text(COMMAND) + b"tRss.")
    yield "torch-load", "calls torch.load on another file", "refuse", with_extra(
        call("torch", "load", text(PAYLOAD_MARK)))
    yield "hub-load", "calls torch.hub.load", "refuse", with_extra(call("torch.hub", "load", text("x"), text("y")))
    yield "numpy-reduce", "rebuilds a numpy array, as honest checkpoints do", "either", with_extra(
        call("numpy.core.multiarray", "_reconstruct", reference("numpy", "ndarray"), b"K\x00\x85", b"C\x01b"))
    yield "numpy-object-array", "a numpy array of objects whose state calls os.system", "refuse", with_extra(
        call("numpy.core.multiarray", "_reconstruct", reference("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
        + b"(K\x01K\x01\x85" + call("numpy", "dtype", text("O8"), b"\x89", b"\x88") + b"\x89]" + system + b"atb")
    yield "in-key", "calls os.system to make a dictionary's key", "refuse", (
        b"\x80\x02}" + text("state_dict") + b"}" + system + tensor() + b"ss.")
    yield "in-persistent-id", "calls os.system to make a storage's name", "refuse", pickled(
        ("weight", tensor(b"(" + text("storage") + reference("torch", "FloatStorage") + system + text("cpu") + number(6) + b"tQ")))
    yield "after-stop", "hides os.system behind the end of the pickle", "either", with_extra(number(1)) + with_extra(system)
    yield "extension", "uses the copyreg extension registry (EXT1)", "refuse", with_extra(b"\x82\x01")
    yield "next-buffer", "asks for an out-of-band buffer", "refuse", with_extra(b"\x97")
    yield "text-persistent-id", "uses the textual persistent id (PERSID)", "refuse", with_extra(b"P0\n")
    yield "billion-laughs", "a memoised list ten times in a list, forty levels", "either", with_extra(laughs())
    yield "dup-doubling", "a pair of the pair before it, sixty levels", "either", with_extra(doubling())
    yield "deep-nesting", "20,000 lists inside one another", "either", with_extra(b"]" * 20_000 + b"a" * 19_999)
    yield "deep-marks", "20,000 marks never closed", "refuse", with_extra(b"(" * 20_000)
    yield "cycle", "a list that contains itself", "either", with_extra(b"]q\x05h\x05a")
    yield "long4", "an integer that claims 2 GB", "refuse", with_extra(b"\x8b\xff\xff\xff\x7f")
    yield "long4-negative", "an integer of negative length", "refuse", with_extra(b"\x8b\xff\xff\xff\xff")
    yield "string-8", "a string that claims 2^62 bytes", "refuse", with_extra(b"\x8d" + struct.pack("<Q", far))
    yield "bytes-4", "bytes that claim 4 GB", "refuse", with_extra(b"B\xff\xff\xff\xff")
    yield "bytearray-8", "a byte array that claims 2^64 bytes", "refuse", with_extra(b"\x96" + b"\xff" * 8)
    yield "frame", "a frame that claims 2^63 bytes", "either", b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + with_extra(number(1))[2:]
    yield "memo-put", "memo index 2^32 - 1", "either", with_extra(number(1) + b"r\xff\xff\xff\xff")
    yield "memo-get", "reads a memo entry nothing was put in", "refuse", with_extra(b"j\xff\xff\xff\xff")
    yield "stack-underflow", "reduces with an empty stack", "refuse", b"\x80\x02R."
    yield "unknown-opcode", "an instruction that does not exist", "refuse", with_extra(b"\xfe")
    yield "protocol", "protocol 250", "refuse", b"\x80\xfa" + with_extra(number(1))[2:]
    yield "no-stop", "ends without STOP", "refuse", with_extra(number(1))[:-1]
    yield "bad-utf8", "a key that is not UTF-8", "refuse", pickled(("weight", tensor())).replace(b"weight", b"we\xff\xfeht")
    yield "two-names", "the same key twice with different shapes", "either", pickled(
        ("weight", tensor()), ("weight", tensor(shape=(3, 2), stride=(2, 1))))
    yield "not-a-dict", "the root is a number", "refuse", b"\x80\x02K\x01."
    yield "empty-pickle", "a pickle of no bytes", "refuse", b""
    yield "no-tensors", "a state dict without a tensor", "either", pickled(("extra", number(1)))
    yield "offset", "a view that starts past its storage", "refuse", pickled(("weight", tensor(offset=5)))
    yield "negative-offset", "a view that starts before its storage", "refuse", pickled(("weight", tensor(offset=-1)))
    yield "stride-out", "strides that leave the storage", "refuse", pickled(("weight", tensor(stride=(1000, 1))))
    yield "negative-stride", "negative strides", "refuse", pickled(("weight", tensor(offset=5, stride=(-3, -1))))
    yield "zero-stride", "one element stretched to 2^40 by strides of zero", "refuse", pickled(
        ("weight", tensor(shape=(1 << 20, 1 << 20), stride=(0, 0))))
    yield "shape-overflow", "a shape whose product wraps to a small number", "refuse", pickled(
        ("weight", tensor(shape=(2**32, 2**32, 6), stride=(0, 0, 1))))
    yield "negative-shape", "a negative extent", "refuse", pickled(("weight", tensor(shape=(-2, -3), stride=(3, 1))))
    yield "rank-mismatch", "more extents than strides", "refuse", pickled(("weight", tensor(shape=(1, 2, 3), stride=(3, 1))))
    yield "storage-size", "a storage that claims more elements than its file has", "refuse", pickled(
        ("weight", tensor(storage(elements=2**40), shape=(2**20, 2**20), stride=(2**20, 1))))
    yield "storage-missing", "a storage whose file is not there", "refuse", pickled(("weight", tensor(storage("9"))))
    yield "storage-path", "a storage named ../../etc/passwd", "refuse", pickled(("weight", tensor(storage("../../../../etc/passwd"))))
    yield "storage-tag", "a persistent id that is no storage", "refuse", pickled(("weight", tensor(storage(tag="module"))))
    yield "storage-type", "a storage type that does not exist", "refuse", pickled(("weight", tensor(storage(dtype="EvilStorage"))))


def archives():
    """(name, what, must, bytes of the whole file)."""
    sound = archive(with_extra(number(1)))
    start = directory_at(sound)
    end = sound.rindex(b"PK\x05\x06")
    yield "deflated.ckpt", "entries are compressed, which torch never does", "refuse", archive(
        with_extra(number(1)), compression=zipfile.ZIP_DEFLATED)
    yield "zip-bomb.ckpt", "a compressed pickle of 16 MB in kilobytes", "refuse", bomb()
    yield "directory-outside.ckpt", "the central directory lies past the end", "refuse", patch(
        sound, end + 16, struct.pack("<I", 0x7FFFFFFF))
    yield "entry-outside.ckpt", "an entry's local header lies past the end", "refuse", patch(
        sound, start + 42, struct.pack("<I", 0x7FFFFFFF))
    yield "entry-size.ckpt", "an entry longer than the file", "refuse", patch(
        sound, start + 20, struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF))
    yield "entry-count.ckpt", "a directory that claims 65,534 entries", "refuse", patch(
        sound, end + 8, struct.pack("<HH", 65534, 65534))
    yield "no-pickle.ckpt", "a zip without data.pkl", "refuse", archive(b"", {"0": VALUES}).replace(b"data.pkl", b"data.txt")
    yield "not-a-zip.ckpt", "text", "refuse", b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"
    yield "empty.ckpt", "an empty file", "refuse", b""
    yield "legacy.ckpt", "the container from before zip (torch < 1.6): read it, or refuse it by name", "either", legacy()
    for part, cut in (("quarter", len(sound) // 4), ("half", len(sound) // 2), ("last-byte", len(sound) - 1)):
        yield f"cut-{part}.ckpt", f"a sound file cut after {cut} of {len(sound)} bytes", "refuse", sound[:cut]

    def header(body, length=None):
        data = body.encode()
        return struct.pack("<Q", len(data) if length is None else length) + data

    good = save({"weight": torch.arange(1.0, 7.0).reshape(2, 3)})
    row = '{"weight":{"dtype":"%s","shape":%s,"data_offsets":%s}%s}'
    yield "control.safetensors", "nothing: a sound file", "read", good
    yield "header-huge.safetensors", "a header of 2^63 bytes", "refuse", header("{}", 2**63) + VALUES
    yield "header-4gb.safetensors", "a header of 4 GB", "refuse", header("{}", 2**32) + VALUES
    yield "header-short.safetensors", "seven bytes", "refuse", good[:7]
    yield "header-not-json.safetensors", "a header that is no JSON", "refuse", header("{weight: 1}") + VALUES
    yield "header-not-utf8.safetensors", "a header that is not UTF-8", "refuse", struct.pack("<Q", 4) + b'{"\xff}' + VALUES
    yield "header-deep.safetensors", "a header of 20,000 nested lists", "refuse", header("[" * 20_000 + "]" * 20_000) + VALUES
    yield "outside.safetensors", "data past the end", "refuse", header(row % ("F32", "[2,3]", "[0,2400]", "")) + VALUES
    yield "backwards.safetensors", "data that ends before it begins", "refuse", header(row % ("F32", "[2,3]", "[24,0]", "")) + VALUES
    yield "size.safetensors", "a shape that needs more than its data", "refuse", header(row % ("F32", "[200,3]", "[0,24]", "")) + VALUES
    yield "overflow.safetensors", "a shape whose product wraps", "refuse", header(
        row % ("F32", "[4294967296,4294967296,6]", "[0,24]", "")) + VALUES
    yield "negative.safetensors", "a negative extent", "refuse", header(row % ("F32", "[-2,-3]", "[0,24]", "")) + VALUES
    yield "dtype.safetensors", "an element type that does not exist", "refuse", header(row % ("F31", "[2,3]", "[0,24]", "")) + VALUES
    yield "overlap.safetensors", "two tensors over the same bytes", "refuse", header(
        row % ("F32", "[2,3]", "[0,24]", ',"other":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}')) + VALUES
    yield "hole.safetensors", "bytes no tensor owns", "refuse", header(row % ("F32", "[2,2]", "[0,16]", "")) + VALUES
    yield "cut.safetensors", "a sound file without its last byte", "refuse", good[:-1]


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    rows = []

    def write(name, what, must, data):
        assert not (FOLDER / name).exists(), name
        (FOLDER / name).write_bytes(data)
        rows.append({"file": name, "what": what, "must": must, "bytes": len(data)})

    for name, what, must, pickle in pickles():
        write(f"{name}.ckpt", what, must, archive(pickle))
    for name, what, must, data in archives():
        write(name, what, must, data)
    for name in ("control.ckpt", "control-v3.ckpt"):
        state = torch.load(FOLDER / name, weights_only=True)["state_dict"]
        assert state["weight"].tolist() == [[1, 2, 3], [4, 5, 6]]
    write_json(FOLDER / "index.json", rows)
    print(f"{len(rows)} files, {sum(f.stat().st_size for f in FOLDER.iterdir()) // 1024} KiB")


if __name__ == "__main__":
    main()
