//! Owns the code generation: the checked-in code is what the `.proto` files say, and no `.proto`
//! file takes back what an earlier one promised. With `CORACLE_REGENERATE=1` it writes instead of
//! comparing (`./x fix` does that). Does not test what the messages mean.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

/// What gRPC serves, and so what reflection shows.
const PUBLIC: [&str; 3] =
    ["coracle/v1/kv.proto", "coracle/v1/cluster.proto", "coracle/v1/admin.proto"];
/// Between nodes.
const PEER: &str = "coracle/peer/v1/peer.proto";

#[test]
fn generated_code_is_what_the_proto_files_say() {
    let mut wanted = generate();
    wanted.insert("descriptor.bin".into(), without_comments(compile(&PUBLIC)).encode_to_vec());

    let dir = crate_dir().join("src/generated");
    if regenerating() {
        for (name, bytes) in &wanted {
            write_if_changed(&dir.join(name), bytes);
        }
    }
    let names: BTreeSet<String> = fs::read_dir(&dir)
        .expect("src/generated is there")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, wanted.keys().cloned().collect(), "files of src/generated");
    for (name, bytes) in &wanted {
        let found = fs::read(dir.join(name)).expect("listed above");
        assert!(found == *bytes, "src/generated/{name} is out of date: run ./x fix");
    }
}

/// Numbers, types and names in use by some client may not change or vanish. The baseline only
/// grows; to break a promise on purpose, its line has to be edited by hand, in sight of a reviewer.
#[test]
fn nothing_promised_is_taken_back() {
    let mut files = PUBLIC.to_vec();
    files.push(PEER);
    let now = listing(&compile(&files));
    let path = crate_dir().join("tests/it/baseline.txt");
    let mut promised = read_baseline(&path);
    let broken = broken_promises(&promised, &now);
    assert!(broken.is_empty(), "breaking changes:\n{}", broken.join("\n"));
    if regenerating() {
        promised.extend(now.clone());
        let text: String = promised.iter().map(|(k, v)| format!("{k} = {v}\n")).collect();
        write_if_changed(&path, text.as_bytes());
    }
    let unlisted: Vec<_> = now.keys().filter(|key| !promised.contains_key(*key)).collect();
    assert!(unlisted.is_empty(), "not in tests/it/baseline.txt: run ./x fix: {unlisted:?}");
}

#[test]
fn the_gate_sees_each_kind_of_break() {
    let now = listing(&compile(&PUBLIC));
    let key = "field coracle.v1.GetRequest 2";
    assert_eq!(now[key], "bytes key");

    let mut vanished = now.clone();
    vanished.remove(key);
    assert_eq!(broken_promises(&now, &vanished).len(), 1);

    let mut retyped = now.clone();
    retyped.insert(key.into(), "string key".into());
    assert_eq!(broken_promises(&now, &retyped).len(), 1);

    let mut grown = now.clone();
    grown.insert("field coracle.v1.GetRequest 99".into(), "uint64 new".into());
    assert!(broken_promises(&now, &grown).is_empty());

    for expected in [
        "rpc coracle.v1.KvService.Scan",
        "value coracle.v1.Consistency 2",
        "field coracle.v1.PipelineError.MetadataEntry 1",
    ] {
        assert!(now.contains_key(expected), "{expected} is not watched");
    }
}

/// What would break a peer of another version, in a `.proto` file, and what the gate says.
#[test]
fn a_proto_file_that_takes_something_back_does_not_pass() {
    let kv = PUBLIC[0];
    for (what, file, from, to) in [
        ("a changed number", kv, "RequestId request_id = 6;", "RequestId request_id = 60;"),
        ("two that change places", kv, "bytes key = 1;\n  // Its", "bytes key = 7;\n  // Its"),
        ("a changed type", kv, "uint64 ttl_ms = 4;", "uint32 ttl_ms = 4;"),
        ("a zigzag that is lost", kv, "sint64 by = 1;", "int64 by = 1;"),
        ("a changed name", kv, "uint64 at_version = 4;", "uint64 version = 4;"),
        ("a field that is gone", kv, "uint64 staleness_ms = 6;", ""),
        ("one of many", kv, "repeated bytes keys = 2;", "bytes keys = 2;"),
        ("a number that is told from 0", kv, "uint64 limit = 5;", "optional uint64 limit = 5;"),
        ("a renumbered value", kv, "CONSISTENCY_ANY = 4;", "CONSISTENCY_ANY = 5;"),
        ("a renamed value", kv, "CONSISTENCY_ANY = 4;", "CONSISTENCY_NONE = 4;"),
        ("a method that is gone", kv, "rpc Get(GetRequest) returns (GetResponse);", ""),
        ("another answer", kv, "returns (GetResponse)", "returns (PutResponse)"),
        ("no stream back", kv, "returns (stream ScanResponse)", "returns (ScanResponse)"),
        ("no stream there", kv, "Pipeline(stream Pipe", "Pipeline(Pipe"),
        ("a renamed service", kv, "service KvService", "service KeyService"),
        ("a renamed package", PEER, "package coracle.peer.v1;", "package coracle.peer.v2;"),
    ] {
        let broken = broken_by(file, from, to, listing(&compile(&[file])));
        assert!(!broken.is_empty(), "{what} passes");
    }
}

/// A number that was given back must not be taken for something else.
#[test]
fn what_is_reserved_stays_reserved() {
    let (file, from) = (PUBLIC[0], "message CheckOperation {}");
    let with = |to| listing(&edited(file, from, to));
    let promised = with("message CheckOperation { reserved 3, 5 to 6; reserved \"old\"; }");
    let broken = |to| broken_promises(&promised, &with(to)).len();
    assert_eq!(broken("message CheckOperation { reserved 3 to 6; reserved \"old\"; }"), 0);
    assert_eq!(broken("message CheckOperation { reserved 3, 5; reserved \"old\"; }"), 1);
    assert_eq!(broken("message CheckOperation { reserved 3, 5 to 6; }"), 1);
    assert_eq!(broken("message CheckOperation { uint64 new = 5; }"), 4);
}

#[test]
fn a_packed_field_stays_packed() {
    let (file, from) = (PUBLIC[0], "message CheckOperation {}");
    let promised =
        listing(&edited(file, from, "message CheckOperation { repeated uint64 a = 1; }"));
    let to = "message CheckOperation { repeated uint64 a = 1 [packed = false]; }";
    assert_eq!(broken_by(file, from, to, promised).len(), 1);
}

fn broken_by(file: &str, from: &str, to: &str, promised: BTreeMap<String, String>) -> Vec<String> {
    broken_promises(&promised, &listing(&edited(file, from, to)))
}

/// A file with one place changed, beside the others as they are. What nobody uses any more is no
/// matter of the compiler's; what does not compile at all would not pass either.
fn edited(file: &str, from: &str, to: &str) -> FileDescriptorSet {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for name in PUBLIC.iter().chain([&PEER]) {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("in a directory")).expect("a directory");
        let mut text = fs::read_to_string(crate_dir().join("proto").join(name)).expect("there");
        if *name == file {
            assert!(text.contains(from), "{from:?} is not in {file}");
            text = text.replacen(from, to, 1);
        }
        fs::write(path, text).expect("the directory is writable");
    }
    compile_in(dir.path(), &[file])
}

fn crate_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn regenerating() -> bool {
    env::var_os("CORACLE_REGENERATE").is_some_and(|value| value == "1")
}

fn write_if_changed(path: &Path, bytes: &[u8]) {
    if fs::read(path).ok().as_deref() != Some(bytes) {
        fs::write(path, bytes).expect("the checkout is writable");
    }
}

fn compile(files: &[&str]) -> FileDescriptorSet {
    compile_in(&crate_dir().join("proto"), files)
}

fn compile_in(dir: &Path, files: &[&str]) -> FileDescriptorSet {
    protox::compile(files, [dir]).expect("the .proto files compile")
}

/// Comments would make the descriptor three times as large and change it with every line moved.
fn without_comments(mut set: FileDescriptorSet) -> FileDescriptorSet {
    for file in &mut set.file {
        file.source_code_info = None;
    }
    set
}

fn generate() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut files = PUBLIC.to_vec();
    files.push(PEER);
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .bytes(".")
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .out_dir(dir.path())
        .compile_fds(compile(&files))
        .expect("code generation");
    fs::read_dir(dir.path())
        .expect("just written")
        .map(|entry| {
            let entry = entry.expect("just written");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).expect("just written"))
        })
        .collect()
}

/// Everything that a peer of another version relies on: one line a field, enum value, RPC, and number
/// or name that is reserved for ever.
fn listing(set: &FileDescriptorSet) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    for file in &set.file {
        let package = file.package();
        for message in &file.message_type {
            list_message(package, message, &mut lines);
        }
        for enumeration in &file.enum_type {
            list_enum(package, enumeration, &mut lines);
        }
        for service in &file.service {
            for rpc in &service.method {
                let stream = |is: bool| if is { "stream " } else { "" };
                lines.insert(
                    format!("rpc {package}.{}.{}", service.name(), rpc.name()),
                    format!(
                        "({}{}) -> {}{}",
                        stream(rpc.client_streaming()),
                        rpc.input_type(),
                        stream(rpc.server_streaming()),
                        rpc.output_type()
                    ),
                );
            }
        }
    }
    lines
}

fn list_message(scope: &str, message: &DescriptorProto, lines: &mut BTreeMap<String, String>) {
    let name = format!("{scope}.{}", message.name());
    lines.insert(format!("message {name}"), "message".into());
    for field in &message.field {
        lines.insert(format!("field {name} {}", field.number()), describe(message, field));
    }
    for range in &message.reserved_range {
        // The end of a message's range is the first number beyond it.
        list_reserved(&name, range.start(), range.end() - 1, lines);
    }
    for reserved in &message.reserved_name {
        lines.insert(format!("reserved {name} {reserved}"), "name".into());
    }
    for nested in &message.nested_type {
        list_message(&name, nested, lines);
    }
    for nested in &message.enum_type {
        list_enum(&name, nested, lines);
    }
}

fn list_enum(scope: &str, enumeration: &EnumDescriptorProto, lines: &mut BTreeMap<String, String>) {
    let name = format!("{scope}.{}", enumeration.name());
    for range in &enumeration.reserved_range {
        list_reserved(&name, range.start(), range.end(), lines);
    }
    for reserved in &enumeration.reserved_name {
        lines.insert(format!("reserved {name} {reserved}"), "name".into());
    }
    for value in &enumeration.value {
        let key = format!("value {scope}.{} {}", enumeration.name(), value.number());
        lines.insert(key, value.name().to_owned());
    }
}

/// A range that grows takes nothing back, so a line a number.
fn list_reserved(name: &str, first: i32, last: i32, lines: &mut BTreeMap<String, String>) {
    assert!(last - first < 1_000, "reserve single numbers, not the rest of {name}");
    for number in first..=last {
        lines.insert(format!("reserved {name} {number}"), "number".into());
    }
}

/// `[repeated|optional] type name [oneof x] [not packed]`.
fn describe(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let kind = match field.r#type() {
        Type::Message | Type::Enum => field.type_name().to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    let label = match field.label() {
        Label::Repeated => "repeated ",
        _ if field.proto3_optional() => "optional ",
        _ => "",
    };
    let group = match field.oneof_index {
        Some(index) if !field.proto3_optional() => {
            format!(" oneof {}", message.oneof_decl[index as usize].name())
        }
        _ => String::new(),
    };
    let packed = match field.options.as_ref().and_then(|options| options.packed) {
        Some(false) => " not packed",
        _ => "",
    };
    format!("{label}{kind} {}{group}{packed}", field.name())
}

fn read_baseline(path: &Path) -> BTreeMap<String, String> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(|line| {
            let (key, value) = line.split_once(" = ").expect("key = value");
            (key.to_owned(), value.to_owned())
        })
        .collect()
}

fn broken_promises(
    promised: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
) -> Vec<String> {
    promised
        .iter()
        .filter_map(|(key, was)| match now.get(key) {
            Some(is) if is == was => None,
            Some(is) => Some(format!("{key}: was {was}, is {is}")),
            None => Some(format!("{key}: was {was}, is gone")),
        })
        .collect()
}
