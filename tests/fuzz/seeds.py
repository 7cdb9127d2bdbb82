#!/usr/bin/env python3
"""Writes the fuzz targets' seeds: tests/fuzz/seeds.py (from anywhere). Valid conversations, a few of each kind, from which the
fuzzer and the ordinary tests start. What a file's first bytes choose is described at the functions in daemon/src/nbd/fuzz and in
daemon/src/vhost/fuzz.rs."""

import os
import struct

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seeds")
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, ONE, FAST, PAYLOAD = 1, 2, 4, 8, 16, 32
GIB = 1 << 30
SIZE = 5 * GIB + 1537


def save(target, name, *parts):
    directory = os.path.join(HERE, target)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, name), "wb") as file:
        file.write(b"".join(parts))


def option(code, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", code, len(data)) + data


def text(words):
    return struct.pack(">I", len(words)) + words


def info(name, *kinds):
    return text(name) + struct.pack(">H%dH" % len(kinds), len(kinds), *kinds)


def contexts(name, *queries):
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


def compact(command, offset=0, length=0, flags=0, payload=b""):
    return struct.pack(">IHHQQI", 0x25609513, flags, command, 0, offset, length) + payload


def extended(command, offset=0, length=0, flags=0, payload=b""):
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, 0, offset, length) + payload


def work(request):
    """A bit of everything."""
    return [
        request(READ, 0, 9000),
        request(WRITE, 4000, 300, payload=bytes(range(256)) + b"x" * 44, **write_flags(request, FUA)),
        request(READ, 3996, 400),
        request(FLUSH),
        request(TRIM, 8192, 12289),
        request(ZEROES, 100, 5000, NO_HOLE),
        request(ZEROES, 20480, 4096, FAST | FUA),
        request(CACHE, 0, 65536),
        request(READ, 0, 65536),
        request(READ, SIZE - 1, 1),
        request(READ, SIZE, 1),
        request(TRIM, 1, SIZE - 1 if request is extended else 0xFFFFFFFF),
        request(9, 0, 0),
    ]


def write_flags(request, flags):
    return {"flags": flags | (PAYLOAD if request is extended else 0)}


def status(request):
    return [
        request(STATUS, 0, 1 << 20),
        request(STATUS, 4095, 2, ONE),
        request(ZEROES, 0, 8192, NO_HOLE),
        request(TRIM, 16384, 4096),
        request(STATUS, 0, SIZE if request is extended else 0xFFFFFFFF),
    ]


FLAGS = struct.pack(">I", 3)
STRUCTURED, EXTENDED = option(8), option(11)
SET = option(10, contexts(b"acme/web", b"base:allocation", b"qemu:allocation-depth"))
LIST_CONTEXTS = [
    option(9, contexts(b"acme/web")),
    option(9, contexts(b"acme/web", b"base:", b"qemu:allocation-depth", b"other:thing")),
    option(10, contexts(b"acme/web", b"base:")),
]


def go(name=b"acme/web", *kinds):
    return option(7, info(name, *kinds))


HANDSHAKES = {
    "export-name": [struct.pack(">I", 1), option(1, b"acme/web"), *work(compact)],
    "export-name-no-zeroes": [FLAGS, option(1, b"acme/ro"), compact(READ, 0, 8192), compact(WRITE, 0, 1, payload=b"w"), compact(DISC)],
    "go": [FLAGS, option(3), option(6, info(b"acme/ro", 0, 1, 2, 3)), go(b"acme/web", 3, 1), *work(compact), compact(DISC)],
    "structured": [FLAGS, STRUCTURED, *LIST_CONTEXTS, SET, go(), *work(compact), *status(compact)],
    "extended": [FLAGS, STRUCTURED, EXTENDED, STRUCTURED, SET, go(), *work(extended), *status(extended)],
    "refusals": [FLAGS, option(5), option(99, b"what"), option(6, info(b"globex/secret")), option(7, b"short"),
                 option(10, contexts(b"acme/web")), option(3, b"data"), option(200, b"z" * 17000), option(2)],
    "other-flags": [struct.pack(">I", 7), option(3)],
    "many-options": [FLAGS, option(3) * 64, option(2)],
}
for name, parts in HANDSHAKES.items():
    save("handshake", name, b"\0", *parts)
save("handshake", "default-export", b"\x04", FLAGS, STRUCTURED, option(10, contexts(b"", b"base:allocation")), go(b"", 1), *status(compact))
save("handshake", "byte-by-byte", b"\x03", *HANDSHAKES["go"])

# First byte: framing in bits 0-1, 4 read-only, 8 hang up at once, 16 slow, 32 failing, pace in bits 6-7; second: contexts.
for framing, request, name in [(0, compact, "simple"), (1, compact, "structured"), (2, extended, "extended")]:
    both = work(request) + (status(request) if framing else [])
    for how, kind in [(0, ""), (4, "-read-only"), (8, "-hangs-up"), (16, "-slow"), (32, "-failing"), (64 + 48, "-failing-slowly-in-pieces")]:
        save("transmission", name + kind, bytes([framing | how, 3]), *both, request(DISC))
    save("transmission", name + "-many", bytes([framing | 16, 1]), *[request(READ, 4096 * i, 4096) for i in range(80)])
    save("transmission", name + "-large", bytes([framing | 16, 0]), *[request(READ, 1 << 20, 32 << 20)] * 4)
    save("transmission", name + "-payload-cut-off", bytes([framing, 0]), request(READ, 0, 1), request(WRITE, 0, 100, payload=b"half"))
    save("transmission", name + "-too-long", bytes([framing, 0]), request(FLUSH), request(WRITE, 0, (32 << 20) + 1, payload=b"x"))
    save("transmission", name + "-overflows", bytes([framing, 0]), request(READ, (1 << 64) - 1, 2), request(READ, 0, (32 << 20) + 1, DF),
         request(ZEROES, 0, 1, FAST | NO_HOLE), request(TRIM, SIZE - 5, 6), b"out of step")
save("transmission", "extended-status-payload", bytes([2, 3]),
     extended(STATUS, 0, 12, PAYLOAD, struct.pack(">QI", 65536, 1)), extended(STATUS, 0, 16, PAYLOAD, struct.pack(">QII", SIZE, 2, 1)),
     extended(STATUS, 0, 8, PAYLOAD | ONE, struct.pack(">Q", 1)), extended(STATUS, 0, 12, PAYLOAD, struct.pack(">QI", 1, 9)),
     extended(STATUS, 0, 20, PAYLOAD, b"x" * 20), extended(READ, 0, 4, PAYLOAD, b"what"), extended(DISC))
save("transmission", "structured-unfragmented", bytes([1, 0]), compact(TRIM, 8192, 4096), compact(READ, 0, 20000, DF), compact(READ, 8192, 4096, DF))

# First byte: mode in bits 0-1, pace in 2-3, 16 close_notify; second: certificate.
STARTTLS = FLAGS + option(5)
save("tls", "clear-options", b"\0\0", FLAGS, option(3), option(6, info(b"acme/web")), STRUCTURED, option(5, b"data"), option(2))
save("tls", "clear-go", b"\0\0", FLAGS, go())
save("tls", "clear-export-name", b"\0\0", FLAGS, option(1, b"acme/web"))
save("tls", "clear-starttls-and-more", b"\0\0", STARTTLS, option(3))
save("tls", "clear-starttls", b"\x0c\0", STARTTLS)
HELLO = bytes.fromhex("0303") + b"r" * 32 + b"\0" + bytes.fromhex("0002130101000a") + bytes.fromhex("002b0003020304")
save("tls", "records-hello", b"\1\0", bytes.fromhex("160301") + struct.pack(">H", len(HELLO) + 4) + b"\1" + struct.pack(">I", len(HELLO))[1:] + HELLO)
save("tls", "records-alert", b"\1\0", bytes.fromhex("15030300020100"))
save("tls", "records-not-tls", b"\1\0", STARTTLS)
UNDER = {
    "go": [option(3), option(6, info(b"acme/ro", 1)), go(b"acme/web", 3), *work(compact), compact(DISC)],
    "extended": [EXTENDED, SET, option(6, info(b"acme/ro")), go(), *work(extended), *status(extended)],
    "refusals": [option(5), option(7, info(b"globex/secret")), option(7, info(b"")), option(2)],
    "export-name": [option(1, b"acme/ro"), compact(READ, 0, 70000), compact(WRITE, 0, 1, payload=b"w")],
}
for name, parts in UNDER.items():
    for certificate in [0, 1, 2, 3, 4] if name == "go" else [0]:
        save("tls", "under-%s-%d" % (name, certificate), bytes([2, certificate]), *parts)
save("tls", "under-globex", b"\x12\1", option(3), STRUCTURED, go(b"", 1, 2), compact(READ, 0, 4096), compact(DISC))
save("tls", "under-then-garbage", b"\3\0", option(3), go(b"acme/web"), compact(READ, 0, 100), b"\x17\x03\x03\x00\x40" + b"g" * 64 + b"garbage")
save("tls", "under-pieces", b"\x16\0", *UNDER["go"])

CALLS = {
    "look": ["GET /v1/version", "GET /v1/status", "GET /v1/stores", "GET /v1/customers", "GET /v1/vms", "GET /v1/volumes", "GET /v1/attachments", "GET /v1/destroys"],
    "look-closer": ["GET /v1/stores/one", "GET /v1/customers/acme", "GET /v1/vms/vm1", "GET /v1/volumes/acme/web", "GET /v1/scrubs",
                    "GET /v1/audit?after=2&limit=3", "GET /v1/audit/verify", "GET /v1/destroys/00000000-0000-0000-0000-000000000000"],
    "stranger": ["?GET /v1/status", "?POST /v1/customers\n{\"name\":\"evil\"}", "?GET /nowhere", "?DELETE /v1/vms/vm1", "?PUT /v1/stores"],
    "customer": ["POST /v1/customers\n{\"name\":\"initech\"}", "POST /v1/vms\n{\"name\":\"v3\",\"customer\":\"initech\",\"uid\":4242}", "DELETE /v1/vms/v3"],
    "volume": ["POST /v1/volumes\n{\"volume\":\"acme/tmp\",\"size_bytes\":1048576,\"replicas\":1}", "POST /v1/volumes/acme/tmp/resize\n{\"size_bytes\":2097152}",
               "POST /v1/attachments\n{\"volume\":\"acme/tmp\",\"vm\":\"vm1\",\"via\":\"nbd\",\"read_only\":true}", "DELETE /v1/volumes/acme/tmp?now=true",
               "POST /v1/detach\n{\"volume\":\"acme/tmp\",\"vm\":\"vm1\"}", "DELETE /v1/volumes/acme/tmp?now=true"],
    "foreign": ["POST /v1/attachments\n{\"volume\":\"acme/web\",\"vm\":\"vm2\"}", "POST /v1/attachments\n{\"volume\":\"globex/db\",\"vm\":\"vm1\",\"via\":\"vhost-user\"}",
                "POST /v1/vms\n{\"name\":\"vm1\",\"customer\":\"globex\"}", "DELETE /v1/vms/vm1"],
    "store": ["POST /v1/stores\n{\"name\":\"two\",\"path\":\"/fuzz/two\",\"size_bytes\":67108864,\"zone\":\"rack\",\"extent_bytes\":1048576,\"allow_buffered\":true}",
              "POST /v1/stores/two/drain\n{}", "POST /v1/stores/two/drain\n{\"cancel\":true}", "POST /v1/stores/two/reopen", "DELETE /v1/stores/two?lost=true", "DELETE /v1/stores/one"],
    "scrub": ["POST /v1/scrubs\n{}", "POST /v1/scrubs\n{\"volume\":\"globex/db\"}"],
    "refusals": ["POST /v1/customers\n{\"name\":\"Acme\"}", "POST /v1/customers\n[]", "POST /v1/volumes\n{\"volume\":\"acme\",\"size_bytes\":18446744073709547520}",
                 "GET /v1/customers/%ff", "DELETE /v1/volumes/acme/web?now=maybe", "PUT /v1/status", "HEAD /v1/status", "GET /v2"],
}
for name, calls in CALLS.items():
    save("api", name, "\n\n".join(calls).encode())


def virtqueue(name, *chains, flags=0x3D, indirect=False):
    """A queue of 16 at 0x1000 (see daemon/src/vhost/fuzz.rs), each chain a list of (bytes to read or room to write)."""
    table, avail, data, place = b"", [], b"", 0x1300
    for chain in chains:
        first, count, here = len(table) // 16, len(chain), b""
        for i, part in enumerate(chain):
            content, flag = (part, 0) if isinstance(part, bytes) else (bytes(part), 2)
            index = i + 1 if indirect else first + i + 1
            here += struct.pack("<QIHH", place, len(content), flag | (i + 1 < count), index)
            data += content
            place += len(content)
        if indirect:
            pad = -place % 16
            here, data, place = struct.pack("<QIHH", place + pad, len(here), 4, 0), data + bytes(pad) + here, place + pad + len(here)
        avail.append(first)
        table += here
    ring = struct.pack("<HH%dH" % len(avail), 0, len(avail), *avail)
    save("virtqueue", name, struct.pack("<BBHHBB", 4, flags, 1000, 0, 0, 0), table.ljust(0x100, b"\0"), ring.ljust(0x200, b"\0"), data)


def block(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


def span(sector, sectors, flags=0):
    return struct.pack("<QII", sector, sectors, flags)


for indirect in [False, True]:
    kind = "indirect" if indirect else "direct"
    virtqueue(kind, [block(0, 3), 512, 1], [block(1, 999), b"w" * 512, 1], [block(4), 1], [block(8), 20, 1], indirect=indirect)
    virtqueue(kind + "-ranges", [block(11), span(0, 500) + span(7, 0), 1], [block(13), span(999, 1, 1), 1], indirect=indirect, flags=0x1C)
virtqueue("cut-up", [block(0)[:5], block(0)[5:], 100, 412, 0, 1], [block(1) + b"w" * 511, b"w", b"", 1], [block(0), 513])
virtqueue("refused", [block(0, 1000), 512, 1], [block(99), 1], [block(1), b"w" * 100, 1], [b"short", 3])
virtqueue("wrong", [block(0), 512, 1], [1, block(0)])
virtqueue("read-only", [block(1), b"w" * 512, 1], [block(13), span(0, 1), 1], [block(0), 1024, 1], flags=0x0E)
