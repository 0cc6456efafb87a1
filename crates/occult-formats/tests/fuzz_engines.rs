//! Random bytes, random pickle programs and mutated valid files never panic the readers of pickles, `.pt` archives,
//! placements and expert maps.
//!
//! `OCCULT_FUZZ_SECONDS=600 cargo test -p occult-formats --test fuzz_engines` keeps going for that long in all.

use std::io::{Cursor, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use occult_formats::export::detect_map;
use occult_formats::pickle::{Item, Pickle, TorchFile};
use occult_formats::{
    ExportFormat, ExportOptions, ImportFormat, ImportOptions, MapOptions, PlacementFile, Profile, describe,
    export, import, import_placement,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engines").join(name)).unwrap()
}

/// Runs `cases` cases, and then more until this test's share of `OCCULT_FUZZ_SECONDS` is over.
fn run<S: Strategy>(cases: u32, share: f64, strategy: S, test: impl Fn(S::Value)) {
    let seconds = std::env::var("OCCULT_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0.0);
    let end = Instant::now() + Duration::from_secs_f64((f64::clamp(seconds, 0.0, 1e6)) * share);
    loop {
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        let result = TestRunner::new(config).run(&strategy, |value| {
            test(value);
            Ok(())
        });
        if let Err(error) = result {
            panic!("{error}");
        }
        if Instant::now() >= end {
            break;
        }
    }
}

/// A change: what to do, where, with which byte, how much.
type Change = (u8, usize, u8, usize);

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let byte =
        prop_oneof![any::<u8>(), proptest::sample::select(b"019-,:[]{}\".(tRbQe\x80\xff\x00".to_vec())];
    proptest::collection::vec((0..6_u8, any::<usize>(), byte, 1..24_usize), 1..6)
}

fn mutate(bytes: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for &(kind, at, byte, n) in changes {
        if out.is_empty() {
            break;
        }
        let at = at % out.len();
        let end = (at + n).min(out.len());
        match kind {
            0 | 1 => out[at] = byte,
            2 => out.insert(at, byte),
            3 => drop(out.drain(at..end)),
            4 => {
                let part = out[at..end].to_vec();
                out.splice(at..at, part);
            }
            _ if n == 1 => out.truncate(at),
            _ => out[at] = out[at].wrapping_add(1),
        }
    }
    out
}

/// Walks a value a few levels down, as importers do.
fn walk(item: Item<'_>, depth: usize) {
    let _ = (item.kind(), item.as_i64(), item.as_f64(), item.as_text(), item.get("records"));
    if let Some(array) = item.array() {
        let _ = array.to_i64();
    }
    if let Some(items) = item.items().filter(|_| depth > 0) {
        items.take(8).for_each(|item| walk(item, depth - 1));
    }
}

fn try_pickle(bytes: &[u8]) {
    match Pickle::parse(bytes) {
        Ok(pickle) => walk(pickle.root(), 4),
        Err(error) => assert!(error.offset <= bytes.len() as u64 && !error.message.is_empty()),
    }
}

const PICKLES: [&str; 14] = [
    "plain_p0.pkl",
    "plain_p1.pkl",
    "plain_p2.pkl",
    "plain_p3.pkl",
    "plain_p4.pkl",
    "plain_p5.pkl",
    "numpy_p0.pkl",
    "numpy_p2.pkl",
    "numpy_p4.pkl",
    "numpy_p5.pkl",
    "c2r_counts.pkl",
    "c2r_order.pkl",
    "evil.pkl",
    "tensors_old_format.pt",
];

#[test]
fn mutated_pickles() {
    for name in PICKLES {
        let bytes = fixture(name);
        run(300, 0.02, changes(), |changes| try_pickle(&mutate(&bytes, &changes)));
    }
}

/// Instructions and arguments in random order: deeper into the machine than random bytes come.
#[test]
fn random_pickle_programs() {
    let parts: Vec<&[u8]> = vec![
        b"(",
        b")",
        b"]",
        b"}",
        b"N",
        b"K\x02",
        b"K\x00",
        b"M\x00\x10",
        b"J\xff\xff\xff\xff",
        b"\x8a\x02\x00\x01",
        b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01",
        b"U\x01a",
        b"X\x02\0\0\0i4",
        b"C\x02ab",
        b"a",
        b"e",
        b"s",
        b"u",
        b"t",
        b"l",
        b"d",
        b"0",
        b"1",
        b"2",
        b"\x85",
        b"\x86",
        b"\x87",
        b"q\x00",
        b"h\x00",
        b"q\x01",
        b"h\x01",
        b"\x94",
        b"R",
        b"b",
        b"Q",
        b"\x81",
        b"\x93",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"G?\xf0\0\0\0\0\0\0",
        b"I01\n",
        b"I7\n",
        b"L9L\n",
        b"S'x'\n",
        b"Vy\n",
        b"F1.5\n",
        b"p3\n",
        b"g3\n",
        b"cnumpy\ndtype\n",
        b"cnumpy\nndarray\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy.core.multiarray\nscalar\n",
        b"cnumpy.core.numeric\n_frombuffer\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nIntStorage\n",
        b"ccollections\nOrderedDict\n",
        b"c_codecs\nencode\n",
        b"cbuiltins\nset\n",
        b"cbuiltins\nbytearray\n",
        b"X\x07\0\0\0storageh\x01X\x01\0\0\x000N",
        b".",
        b"\x80\x04",
        b"\x95\x01\0\0\0\0\0\0\0",
    ];
    let program = proptest::collection::vec(proptest::sample::select(parts), 0..60);
    run(4000, 0.1, program, |parts| {
        let mut bytes = parts.concat();
        bytes.push(b'.');
        try_pickle(&bytes);
    });
    run(2000, 0.02, proptest::collection::vec(any::<u8>(), 0..200), |bytes| try_pickle(&bytes));
}

/// The members of an archive, so that a changed one can be put back with a right checksum.
fn members(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
    (0..archive.len())
        .map(|i| {
            let mut entry = archive.by_index(i).unwrap();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            (entry.name().unwrap().into_owned(), data)
        })
        .collect()
}

fn archive(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, data) in members {
        writer.start_file(name.as_str(), options).unwrap();
        writer.write_all(data).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn read_tensors(file: &mut TorchFile<Cursor<&[u8]>>, item: Item<'_>, depth: usize) {
    if let Some(tensor) = item.tensor() {
        let _ = (file.read_i64(tensor), file.read_f64(tensor));
    }
    for key in
        ["records", "logical_count", "base", "sliced", "f16", "topk_ids_of_layer", "physical_to_logical_map"]
    {
        if let Some(item) = item.get(key).filter(|_| depth > 0) {
            read_tensors(file, item, depth - 1);
        }
    }
    if let Some(items) = item.items().filter(|_| depth > 0) {
        items.take(4).for_each(|item| read_tensors(file, item, depth - 1));
    }
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Imports; what succeeds can be opened, what fails leaves nothing.
    fn try_import(&self, format: ImportFormat, input: PathBuf) {
        let options = ImportOptions {
            format: Some(format),
            num_experts: (format == ImportFormat::SglangHttp).then_some(6),
            num_hidden_layers: (format == ImportFormat::SglangHttp).then_some(3),
            top_k: (format != ImportFormat::SglangRecorder).then_some(2),
            ..ImportOptions::default()
        };
        let output = self.folder.path().join("out.safetensors");
        match import(&[input], &options, &output, &mut |_, _| {}) {
            Ok(summary) => {
                assert_eq!(Profile::open(&output).unwrap().num_layers(), summary.meta.num_layers());
                std::fs::remove_file(&output).unwrap();
            }
            Err(error) => assert!(!error.to_string().is_empty() && !output.exists()),
        }
    }
}

#[test]
fn mutated_torch_archives() {
    let place = Place::new();
    for name in
        ["tensors.pt", "sglang_stat.pt", "sglang_per_pass_0.pt", "sglang_per_token_0.pt", "sglang_map.pt"]
    {
        let bytes = fixture(name);
        let parts = members(&bytes);
        let pickle = parts.iter().position(|(name, _)| name.ends_with("data.pkl")).unwrap();
        let which = prop_oneof![4 => Just(pickle), 1 => 0..parts.len()];
        run(150, 0.08, (which, changes(), any::<bool>()), |(which, changes, whole)| {
            let changed = if whole {
                mutate(&bytes, &changes)
            } else {
                let mut parts = parts.clone();
                parts[which].1 = mutate(&parts[which].1, &changes);
                archive(&parts)
            };
            if let Ok(mut file) = TorchFile::new(Cursor::new(changed.as_slice())) {
                let pickle = file.pickle();
                read_tensors(&mut file, pickle.root(), 4);
            }
            let path = place.file("a.pt", &changed);
            let _ = describe(&path);
            place.try_import(ImportFormat::SglangRecorder, path.clone());
            let options = MapOptions { num_ranks: Some(2), ..MapOptions::default() };
            let _ = import_placement(&path, Some(ExportFormat::Sglang), &options);
        });
    }
}

#[test]
fn mutated_recordings() {
    let place = Place::new();
    let http = br#"{"meta_info": {"routed_experts": "AAAAAAAAAAADAAAAAQAAAAAAAAACAAAA"}}"#.to_vec();
    let seeds = [
        (ImportFormat::SglangHttp, http),
        (ImportFormat::C2rPickle, fixture("c2r_counts.pkl")),
        (ImportFormat::C2rPickle, fixture("c2r_order.pkl")),
    ];
    for (format, bytes) in seeds {
        run(200, 0.05, changes(), |changes| {
            let path = place.file("a", &mutate(&bytes, &changes));
            let _ = describe(&path);
            place.try_import(format, path);
        });
    }
}

const PLACEMENT: &str = r#"{"format": "occult.placement.v1", "num_experts": 4, "num_ranks": 2, "num_nodes": 1, "layer_ids": [1, 2],
"num_hidden_layers": 3, "method": "search", "seed": 3, "figures": {"a": [1, null]}, "layers": [
{"layer": 1, "ranks": [[0, 2], [1, 3]]}, {"layer": 2, "ranks": [[0, 1], [2, 3]]}]}"#;

#[test]
fn mutated_placements_and_maps() {
    let place = Place::new();
    let file = PlacementFile::parse(Path::new("p"), PLACEMENT.as_bytes()).unwrap();
    run(2000, 0.1, changes(), |changes| {
        let bytes = mutate(PLACEMENT.as_bytes(), &changes);
        if let Ok(file) = PlacementFile::parse(Path::new("p"), &bytes) {
            let text = file.to_json().unwrap();
            assert_eq!(PlacementFile::parse(Path::new("p"), text.as_bytes()).unwrap(), file);
            for format in ExportFormat::ALL {
                let _ = export(&file, format, &ExportOptions::default());
            }
        }
    });
    for format in ExportFormat::ALL {
        let text = export(&file, format, &ExportOptions::default()).unwrap().text;
        run(200, 0.03, (changes(), 0..4_usize), |(changes, ranks)| {
            let path = place.file("map", &mutate(text.as_bytes(), &changes));
            let _ = (detect_map(&path), describe(&path));
            let options = MapOptions { num_ranks: Some(ranks), ..MapOptions::default() };
            for wanted in [Some(format), None] {
                if let Ok(file) = import_placement(&path, wanted, &options) {
                    assert!(file.to_json().is_ok());
                }
            }
        });
    }
}
