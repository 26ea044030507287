#!/usr/bin/env python3
"""Uses Coracle from Python, with a client generated from the protos: any node for any key.

    python example.py [--stubs DIR] HOST:PORT...

Needs the packages of requirements.txt. Prints what it does, and ends with 0 when everything was
as it should be.
"""

import argparse
import contextlib
import importlib
import pathlib
import random
import secrets
import sys
import tempfile
import time

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

PROTOS = pathlib.Path(__file__).resolve().parents[2] / "proto" / "proto"
KEYS = 200
# One attempt, and a call with all its retries, in seconds.
ATTEMPT_TIMEOUT, CALL_TIMEOUT = 2.0, 20.0


def generate(directory):
    """Writes the Python code of the public protos into a directory."""
    files = sorted(str(file) for file in (PROTOS / "coracle" / "v1").glob("*.proto"))
    args = ["protoc", f"-I{PROTOS}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    if not files or protoc.main(args + files) != 0:
        sys.exit(f"cannot generate a client from {PROTOS}")


class Failure(Exception):
    """A refusal with the service's own reason."""

    def __init__(self, error):
        super().__init__(error.details())
        self.code = error.code()
        self.reason, self.metadata = "", {}
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                for detail in status_pb2.Status.FromString(value).details:
                    info = error_details_pb2.ErrorInfo()
                    if detail.Unpack(info) and info.domain == "coracle":
                        self.reason, self.metadata = info.reason, dict(info.metadata)

    def passes(self):
        """Whether the same request, with the same request id, may fare better later."""
        codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return self.code in codes or self.reason in ("OVERLOADED", "WRITE_STALLED")


class Client:
    """Every node of a cluster. Calls name the node to ask first."""

    def __init__(self, addresses, stubs):
        sys.path.insert(0, str(stubs))
        self.kv = importlib.import_module("coracle.v1.kv_pb2")
        self.cluster = importlib.import_module("coracle.v1.cluster_pb2")
        kv_grpc = importlib.import_module("coracle.v1.kv_pb2_grpc")
        cluster_grpc = importlib.import_module("coracle.v1.cluster_pb2_grpc")
        # The largest answer, a BatchGet, has values of 4 MiB. Nodes are not behind a web proxy.
        options = [("grpc.max_receive_message_length", 8 << 20), ("grpc.enable_http_proxy", 0)]
        self.channels = [grpc.insecure_channel(address, options) for address in addresses]
        self.nodes = [kv_grpc.KvServiceStub(channel) for channel in self.channels]
        self.clusters = [cluster_grpc.ClusterServiceStub(channel) for channel in self.channels]
        # Names this client's writes: drawn once, with a sequence that rises by one per write.
        self.id, self.sequence = secrets.randbits(63) + 1, 0
        # When a write is born, in the servers' time.
        shard_map = self.call(self.clusters, 0, "GetMap", self.cluster.GetMapRequest()).map
        self.birth, self.birth_read = shard_map.server_time_ms, time.monotonic()

    def call(self, stubs, first, method, request):
        """Asks `first`, and the next node for as long as the failure is one that passes."""
        deadline, attempt = time.monotonic() + CALL_TIMEOUT, 0
        while True:
            stub = stubs[(first + attempt) % len(stubs)]
            try:
                answer = getattr(stub, method)(request, timeout=ATTEMPT_TIMEOUT)
                return list(answer) if method == "Scan" else answer
            except grpc.RpcError as error:
                failure = Failure(error)
                if not failure.passes() or time.monotonic() > deadline:
                    raise failure from error
            attempt += 1
            time.sleep(random.uniform(0, min(0.01 * 2**attempt, 1.0)))

    def read(self, node, method, request):
        return self.call(self.nodes, node, method, request)

    def write(self, node, method, request):
        """A write is applied once, however often it is sent: every attempt has the same id."""
        self.sequence += 1
        request.request_id.client = self.id
        request.request_id.sequence = self.sequence
        request.request_id.birth = self.birth + int((time.monotonic() - self.birth_read) * 1000)
        # This client makes one write at a time: all before it have been answered.
        request.request_id.lowest_unanswered = self.sequence
        return self.call(self.nodes, node, method, request)


def expect(what, found, wanted):
    if found != wanted:
        sys.exit(f"{what}: found {found!r}, wanted {wanted!r}")


def any_node_for_any_key(client, prefix):
    """Each key goes in through one node and comes out of all the others."""
    kv, nodes = client.kv, len(client.nodes)
    keys = [prefix + b"%05d" % number for number in range(KEYS)]
    for number, key in enumerate(keys):
        put = kv.PutRequest(key=key, value=b"value %d" % number)
        expect("put", client.write(number % nodes, "Put", put).applied, True)
    for number, key in enumerate(keys):
        for step in range(min(1, nodes - 1), nodes):
            got = client.read((number + step) % nodes, "Get", kv.GetRequest(key=key))
            expect(f"{key}", got.entry.value, b"value %d" % number)
    for node in range(nodes):
        batch = client.read(node, "BatchGet", kv.BatchGetRequest(keys=keys + [prefix + b"none"]))
        found = [item.entry.value if item.HasField("entry") else None for item in batch.items]
        expect("batch get", found, [b"value %d" % number for number in range(KEYS)] + [None])
        pages = client.read(node, "Scan", kv.ScanRequest(prefix=prefix))
        expect("scan", [item.key for page in pages for item in page.entries], keys)
        last = kv.ScanRequest(prefix=prefix, reverse=True, limit=3, keys_only=True)
        pages = client.read(node, "Scan", last)
        found = [item.key for page in pages for item in page.entries]
        expect("reverse scan", found, keys[:-4:-1])
    print(f"{KEYS} keys: each put through one node, read through all others, and scanned in order")


def conditions(client, key):
    """Compare and set: only one of two writers wins, and the other learns why it did not."""
    kv, last = client.kv, len(client.nodes) - 1
    absent = kv.Condition(if_absent=True)
    first = client.write(0, "Put", kv.PutRequest(key=key, value=b"1", condition=absent))
    expect("put if absent", first.applied, True)
    second = client.write(last, "Put", kv.PutRequest(key=key, value=b"2", condition=absent))
    expect("put if absent again", (second.applied, second.current.value), (False, b"1"))
    at_version = kv.Condition(if_version=second.current.version)
    third = client.write(last, "Put", kv.PutRequest(key=key, value=b"3", condition=at_version))
    expect("put if version", third.applied, True)
    deleted = client.write(0, "Delete", kv.DeleteRequest(key=key))
    expect("delete", deleted.applied, True)
    gone = client.read(last, "Get", kv.GetRequest(key=key))
    expect("get after delete", gone.HasField("entry"), False)
    print("conditions: the second writer was told the value and the version of the first")


def batches(client, name):
    """Keys of one entity, here everything up to a colon, change together or not at all."""
    kv, last = client.kv, len(client.nodes) - 1
    rule = client.cluster.EntityRule(delimiter=ord(":"))
    create = client.cluster.CreateKeyspaceRequest(name=name, entity_rule=rule)
    try:
        client.call(client.clusters, last, "CreateKeyspace", create)
    except Failure as failure:
        # From an earlier run.
        if failure.reason != "KEYSPACE_EXISTS":
            raise
    entity = b"order/%d:" % secrets.randbits(63)
    operations = [
        kv.Operation(
            key=entity + b"state",
            put=kv.PutOperation(value=b"paid"),
            condition=kv.Condition(if_absent=True),
        ),
        kv.Operation(key=entity + b"events", increment=kv.IncrementOperation(by=1)),
    ]
    batch = kv.WriteRequest(keyspace=name, operations=operations)
    written = client.write(0, "Write", batch)
    expect("batch", (written.applied, written.results[1].counter), (True, 1))
    refused = client.write(last, "Write", batch)
    failed = [result.condition_failed for result in refused.results]
    expect("batch again", (refused.applied, failed), (False, [True, False]))
    pages = client.read(last, "Scan", kv.ScanRequest(keyspace=name, prefix=entity))
    found = [(item.key, item.entry.value) for page in pages for item in page.entries]
    expect("entity", found, [(entity + b"events", b"1"), (entity + b"state", b"paid")])
    print("batch: both keys of the entity were written, and neither when a condition failed")


def errors(client, prefix):
    """What makes no sense is refused, with a reason that programs can rely on."""
    kv = client.kv
    two = [kv.Operation(key=prefix + key, delete=kv.DeleteOperation()) for key in (b"a", b"b")]
    cases = [
        ("TOO_LARGE", "Put", kv.PutRequest(key=b"k" * 4097)),
        ("INVALID_ARGUMENT", "Put", kv.PutRequest(value=b"a value without a key")),
        ("CROSS_ENTITY", "Write", kv.WriteRequest(operations=two)),
        ("UNKNOWN_KEYSPACE", "Put", kv.PutRequest(keyspace="nowhere", key=b"k")),
    ]
    for node in range(len(client.nodes)):
        for reason, method, request in cases:
            try:
                client.write(node, method, request)
                sys.exit(f"{reason}: was not refused")
            except Failure as failure:
                outcome = failure.metadata.get("outcome")
                expect(f"{failure}", (failure.reason, outcome), (reason, "not_applied"))
                if node == 0:
                    print(f"error {failure.reason}: {failure} {failure.metadata}")


def use(client):
    # A prefix of its own: it can run again, and beside another.
    prefix = b"python/%d/" % secrets.randbits(63)
    any_node_for_any_key(client, prefix)
    conditions(client, prefix + b"condition")
    batches(client, "python-example")
    errors(client, prefix)
    for channel in client.channels:
        channel.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stubs", metavar="DIR", help="keep the generated code here")
    parser.add_argument("nodes", nargs="+", metavar="HOST:PORT")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.stubs:
            stubs = pathlib.Path(args.stubs)
            stubs.mkdir(parents=True, exist_ok=True)
        else:
            stubs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        generate(stubs)
        try:
            use(Client(args.nodes, stubs))
        except Failure as failure:
            sys.exit(f"{failure.code.name} {failure.reason}: {failure} {failure.metadata}")
    print(f"ok: {KEYS} keys through {len(args.nodes)} nodes")


if __name__ == "__main__":
    main()
