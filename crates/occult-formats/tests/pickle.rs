//! The pickle reader against files that Python, numpy and torch wrote, and against files that want to run programs.

use std::path::PathBuf;

use occult_formats::pickle::{Element, Item, Pickle, TorchFile};
use serde_json::Value as Json;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engines").join(name)
}

fn parse(name: &str) -> Pickle {
    Pickle::parse(&std::fs::read(fixture(name)).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn refusal(stream: &[u8]) -> String {
    Pickle::parse(stream).unwrap_err().to_string()
}

fn expected(part: &str) -> Json {
    let all: Json = serde_json::from_slice(&std::fs::read(fixture("expected.json")).unwrap()).unwrap();
    all[part].clone()
}

fn numbers(json: &Json) -> Vec<i64> {
    json.as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
}

fn list<'a>(item: Item<'a>) -> Vec<Item<'a>> {
    item.items().unwrap().collect()
}

#[test]
fn plain_objects_of_every_protocol() {
    for protocol in 0..6 {
        let pickle = parse(&format!("plain_p{protocol}.pkl"));
        let root = pickle.root();
        let ints = list(root.get("ints").unwrap());
        let read: Vec<Option<i64>> = ints.iter().map(|i| i.as_i64()).collect();
        let (min, max) = (-(1_i64 << 31), 1_i64 << 31);
        let wanted = [0, 1, 255, 256, 65535, 65536, -1, min, max, 1 << 62, i64::MIN];
        assert_eq!(read[..11], wanted.map(Some), "protocol {protocol}");
        assert_eq!((read[11], ints[11].kind()), (None, "an integer"), "2^70 does not fit");
        let floats: Vec<_> = list(root.get("floats").unwrap()).iter().map(|f| f.as_f64()).collect();
        assert_eq!(floats, [Some(0.5), Some(-1e300)]);
        assert_eq!(root.get("text").unwrap().as_text(), Some("hüte\nzwei 🦀"), "protocol {protocol}");
        assert_eq!(root.get("bytes").unwrap().kind(), "bytes", "protocol {protocol}");
        let flags = list(root.get("flags").unwrap());
        assert_eq!((flags[0].as_i64(), flags[1].as_i64(), flags[2].kind()), (Some(1), Some(0), "None"));
        for part in list(root.get("shared").unwrap()) {
            assert_eq!(list(part).iter().map(|i| i.as_i64().unwrap()).collect::<Vec<_>>(), [1, 2]);
        }
        let kinds: Vec<_> = list(root.get("nested").unwrap()).iter().map(|i| i.kind()).collect();
        assert_eq!(kinds, ["a list", "a tuple", "a dict", "a tuple", "a tuple", "a tuple", "a tuple"]);
        assert_eq!(root.get("ordered").unwrap().get("b").unwrap().as_i64(), Some(2));
    }
}

#[test]
fn numpy_arrays_of_every_order_and_version() {
    let wanted = expected("numpy");
    for protocol in [0, 2, 4, 5] {
        let name = format!("numpy_p{protocol}.pkl");
        let bytes = std::fs::read(fixture(&name)).unwrap();
        let mut streams = vec![bytes.clone()];
        if protocol < 4 {
            // numpy 1 called its module numpy.core.
            let text: Vec<u8> = bytes.clone();
            let old = String::from_utf8_lossy(&text).matches("numpy._core").count();
            assert!(old > 0);
            streams.push(replace(&text, b"numpy._core", b"numpy.core"));
        }
        for stream in streams {
            let pickle = Pickle::parse(&stream).unwrap_or_else(|e| panic!("{name}: {e}"));
            let root = pickle.root();
            for key in ["c", "fortran", "big", "bytes", "empty"] {
                let array = root.get(key).unwrap().array().unwrap();
                assert_eq!(array.to_i64().unwrap(), numbers(&wanted[key]), "{name} {key}");
            }
            assert_eq!(root.get("c").unwrap().array().unwrap().shape(), [2, 3, 4]);
            assert_eq!(root.get("empty").unwrap().array().unwrap().shape(), [0, 3]);
            assert_eq!(root.get("scalar").unwrap().as_i64(), Some(-7), "{name}");
        }
    }
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some(at) = rest.windows(from.len()).position(|w| w == from) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(to);
        rest = &rest[at + from.len()..];
    }
    out.extend_from_slice(rest);
    out
}

#[test]
fn torch_tensors_with_strides_offsets_and_every_type() {
    let mut file = TorchFile::open(&fixture("tensors.pt")).unwrap();
    let pickle = file.pickle();
    let wanted = expected("tensors");
    for (key, values) in wanted.as_object().unwrap() {
        let tensor = pickle.root().get(key).unwrap().tensor().unwrap();
        assert_eq!(file.read_i64(tensor).unwrap(), numbers(values), "{key}");
    }
    for (key, element) in
        [("f16", Element::F16), ("bf16", Element::BF16), ("f32", Element::F32), ("f64", Element::F64)]
    {
        let tensor = pickle.root().get(key).unwrap().tensor().unwrap();
        assert_eq!(tensor.element(), element);
        assert_eq!(file.read_f64(tensor).unwrap(), [0.5, -2.0], "{key}");
        assert!(file.read_i64(tensor).unwrap_err().contains("not a whole number"));
    }
    assert_eq!(pickle.root().get("sliced").unwrap().tensor().unwrap().shape(), [3, 3]);
}

#[test]
fn programs_are_refused_by_name() {
    let evil = std::fs::read(fixture("evil.pkl")).unwrap();
    let message = refusal(&evil);
    assert!(message.contains("posix.system") && message.contains("refused"), "{message}");
    let message = TorchFile::open(&fixture("evil.pt")).unwrap_err();
    assert!(message.contains("posix.system"), "{message}");
    for (module, name) in [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch.jit", "load"),
        ("numpy", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy.core.multiarray", "_reconstruct.__class__"),
    ] {
        let stream = format!("c{module}\n{name}\n(S'x'\ntR.");
        assert!(refusal(stream.as_bytes()).contains(&format!("wants to run {module}.{name}, refused")));
        let mut stream = vec![0x80, 4, 0x8c, module.len() as u8];
        stream.extend(module.bytes());
        stream.extend([0x8c, name.len() as u8]);
        stream.extend(name.bytes());
        stream.extend([0x93, b'.']);
        assert!(refusal(&stream).contains(&format!("wants to run {module}.{name}, refused")));
    }
    // The other instructions that call or create.
    assert!(refusal(b"(S'ls'\nios\nsystem\n.").contains("os.system"));
    assert!(refusal(b"cnumpy\nndarray\n)\x81.").contains("create an object"));
    assert!(refusal(b"(cnumpy\nndarray\no.").contains("create an object"));
    assert!(refusal(b"\x82\x01.").contains("extension"));
    assert!(refusal(b"(lI1\n\x85R.").contains("refused"));
}

#[test]
fn broken_streams_say_where() {
    assert_eq!(refusal(b""), "pickle, byte 0: expected 1 more bytes, found 0");
    assert!(refusal(b"\x80\x09.").contains("protocol 9"));
    assert!(refusal(b".").contains("stack is empty"));
    assert!(refusal(b"(.").contains("stack is empty"));
    assert!(refusal(b"]h\x07.").contains("memo 7 was never set"));
    assert!(refusal(b"Na.").contains("stack is empty"));
    assert!(refusal(b"NNa.").contains("not a list"));
    assert!(refusal(b"}(Nu.").contains("no value"));
    assert!(refusal(b"\xff").contains("0xff is not a pickle instruction"));
    // A string that claims 2^40 bytes, an array that claims more elements than it has.
    assert!(refusal(b"\x8d\0\0\0\0\0\x01\0\0").contains("expected 1099511627776 more bytes"));
    let whole = std::fs::read(fixture("numpy_p4.pkl")).unwrap();
    for cut in 0..whole.len() {
        assert!(Pickle::parse(&whole[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn hostile_shapes_of_streams_stay_small() {
    // A million lists inside each other, a list inside itself, and one byte string copied a million times.
    let mut deep = vec![b']'; 1_000_000];
    deep.extend(vec![b'a'; 999_999]);
    deep.push(b'.');
    assert_eq!(Pickle::parse(&deep).unwrap().root().items().unwrap().count(), 1);
    let own = Pickle::parse(b"]q\0h\0a.").unwrap();
    assert_eq!(own.root().items().unwrap().next().unwrap().kind(), "a list");
    let mut copies = b"cbuiltins\nbytearray\nq\x00\x96".to_vec();
    copies.extend(100_000_u64.to_le_bytes());
    copies.extend(vec![7; 100_000]);
    copies.extend(b"\x85q\x01");
    copies.extend(b"h\x00h\x01R0".repeat(100_000));
    copies.extend(b"N.");
    assert!(refusal(&copies).contains("again and again"));
}
