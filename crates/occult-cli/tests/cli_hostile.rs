//! Files that are not what they say: exit code 1, one line with file, layer and row, and nothing left behind.
//! ([`Lab::refused`] checks the code, the one line, and that every file is as it was.)

mod common;

use common::{Array, Lab, Rows, npz, safetensors, says};

const TOKENS: usize = 40;
const LAYERS: usize = 3;
const EXPERTS: usize = 8;
const K: usize = 2;

fn rows() -> Rows {
    Rows::new(61, TOKENS, LAYERS, EXPERTS, K)
}

/// Position of expert 0 of a row of a layer in the arrays.
fn at(layer: usize, row: usize, width: usize) -> usize {
    (row * LAYERS + layer) * width
}

/// As safetensors and as npz; `ids` are `[TOKENS, LAYERS, K]`.
fn files(lab: &Lab, ids: &[i32], weights: Option<&[f32]>, logits: Option<&[f32]>) -> [&'static str; 2] {
    let arrays = || {
        let mut arrays = vec![Array::i32("expert_ids", &[TOKENS, LAYERS, K], ids.iter().copied())];
        arrays.extend(weights.map(|w| Array::f32("weights", &[TOKENS, LAYERS, K], w.iter().copied())));
        arrays.extend(
            logits.map(|l| Array::f32("router_logits", &[TOKENS, LAYERS, EXPERTS], l.iter().copied())),
        );
        arrays
    };
    lab.write("bad.safetensors", safetensors(&arrays(), &[("num_experts", "8")]));
    let mut members = arrays();
    members.push(Array::i32("num_experts", &[], [EXPERTS as i32]));
    lab.write("bad.npz", npz(&members));
    ["bad.safetensors", "bad.npz"]
}

fn good_ids() -> Vec<i32> {
    rows().ids.iter().map(|&e| i32::from(e)).collect()
}

#[track_caller]
fn import_refused(ids: &[i32], weights: Option<&[f32]>, logits: Option<&[f32]>, parts: &[&str]) {
    let lab = Lab::new();
    for file in files(&lab, ids, weights, logits) {
        let message = lab.refused(1, &format!("import {file} -o profile.safetensors"));
        says(&message, &[file]);
        says(&message, parts);
        assert_eq!(lab.names(), ["bad.npz", "bad.safetensors"]);
    }
}

#[test]
fn ids_out_of_range() {
    for id in [8, 70_000, -1, i32::MIN] {
        let mut ids = good_ids();
        ids[at(2, 17, K) + 1] = id;
        import_refused(&ids, None, None, &["layer 2", "row 17", &id.to_string(), "8 experts"]);
    }
}

#[test]
fn duplicate_experts_in_a_row() {
    let mut ids = good_ids();
    ids[at(1, 39, K)] = 3;
    ids[at(1, 39, K) + 1] = 3;
    import_refused(&ids, None, None, &["layer 1", "row 39", "expert 3", "twice"]);
}

#[test]
fn weights_and_scores_that_are_no_numbers() {
    let good = rows();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut weights = good.weights.clone().unwrap();
        weights[at(0, 5, K)] = bad;
        import_refused(&good_ids(), Some(&weights), None, &["layer 0", "row 5", "weight"]);
        let mut logits = good.logits.clone().unwrap();
        logits[at(2, 31, EXPERTS) + 7] = bad;
        import_refused(&good_ids(), None, Some(&logits), &["layer 2", "row 31"]);
    }
}

#[test]
fn zero_tokens() {
    let lab = Lab::new();
    let empty = || vec![Array::i32("expert_ids", &[0, LAYERS, K], [])];
    lab.write("empty.safetensors", safetensors(&empty(), &[("num_experts", "8")]));
    lab.write("empty.npz", npz(&empty()));
    lab.write("nothing", "");
    for file in ["empty.safetensors", "empty.npz"] {
        let message = lab.refused(1, &format!("import {file} --experts 8 -o profile.safetensors"));
        says(&message, &[file, "no tokens"]);
    }
    says(&lab.refused(1, "import nothing -o profile.safetensors"), &["nothing", "empty"]);
}

#[test]
fn arrays_that_contradict_each_other() {
    let lab = Lab::new();
    let ids = || Array::i32("expert_ids", &[TOKENS, LAYERS, K], good_ids());
    let weights = Array::f32("weights", &[TOKENS, LAYERS, 1], vec![0.5; TOKENS * LAYERS]);
    let logits = Array::f32("router_logits", &[TOKENS, LAYERS, 9], vec![0.5; TOKENS * LAYERS * 9]);
    let floats = Array::f32("expert_ids", &[TOKENS, LAYERS, K], vec![0.0; TOKENS * LAYERS * K]);
    for (arrays, parts) in [
        (vec![ids(), weights], ["weights", "[40, 3, 1]", "[40, 3, 2]"]),
        (vec![ids(), logits], ["num_experts is 8", "router_logits", "9"]),
        (vec![floats], ["expert_ids", "F32", "integer"]),
    ] {
        lab.write("bad.safetensors", safetensors(&arrays, &[("num_experts", "8")]));
        let message = lab.refused(1, "import bad.safetensors -o profile.safetensors");
        says(&message, &["bad.safetensors"]);
        says(&message, &parts);
    }
}

#[test]
fn layer_counts_that_differ_between_files() {
    let lab = Lab::new();
    lab.write("a.safetensors", rows().safetensors());
    lab.write("b.safetensors", Rows::new(61, TOKENS, LAYERS + 1, EXPERTS, K).safetensors());
    let message = lab.refused(1, "import a.safetensors b.safetensors -o profile.safetensors");
    says(&message, &["b.safetensors", "layer counts differ", "3", "4"]);
}

#[test]
fn inputs_cut_anywhere() {
    let lab = Lab::new();
    for (name, whole) in [("cut.safetensors", rows().safetensors()), ("cut.npz", rows().npz())] {
        for part in [0.01, 0.1, 0.5, 0.9, 0.999] {
            lab.write(name, &whole[..(whole.len() as f64 * part) as usize]);
            says(&lab.refused(1, &format!("import {name} -o profile.safetensors")), &[name]);
        }
    }
}

/// A header that promises more than the file has, and one that is longer than any memory.
#[test]
fn headers_that_lie() {
    let lab = Lab::new();
    let whole = rows().safetensors();
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    lab.write("huge.safetensors", huge);
    let mut lying = whole.clone();
    let position = whole.windows(8).position(|w| w == b"[40,3,2]").unwrap();
    lying[position..position + 8].copy_from_slice(b"[99,3,2]");
    lab.write("lying.safetensors", lying);
    for file in ["huge.safetensors", "lying.safetensors"] {
        says(&lab.refused(1, &format!("import {file} -o profile.safetensors --format safetensors")), &[file]);
    }
}

/// An output that was there stays as it was when an import fails.
#[test]
fn a_failed_import_keeps_the_old_profile() {
    let lab = Lab::with(&rows());
    let mut ids = good_ids();
    ids[at(2, 39, K)] = 99;
    files(&lab, &ids, None, None);
    let old = lab.read("profile.safetensors");
    says(&lab.refused(1, "import bad.npz -o profile.safetensors"), &["bad.npz", "layer 2", "row 39"]);
    assert!(old == lab.read("profile.safetensors"));
}

/// `os.system("touch marker")`, as pickle runs it when it is loaded, and the same inside a file of `torch.save`.
#[test]
fn pickles_that_want_to_run_programs_do_not() {
    let lab = Lab::new();
    let pickle = b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00touch marker\x85R.".to_vec();
    lab.write("evil.pkl", &pickle);
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in [("evil/data.pkl", pickle.as_slice()), ("evil/version", b"3\n")] {
        let stored = zip::CompressionMethod::Stored;
        let options = zip::write::SimpleFileOptions::default().compression_method(stored);
        zip.start_file(name, options).unwrap();
        std::io::Write::write_all(&mut zip, bytes).unwrap();
    }
    lab.write("expert_distribution_recorder_1.pt", zip.finish().unwrap().into_inner());
    for (file, formats) in [
        ("evil.pkl", &["", "--format c2r-pickle"][..]),
        ("expert_distribution_recorder_1.pt", &["", "--format sglang"][..]),
    ] {
        for format in formats {
            let message = lab.refused(1, &format!("import {file} {format} -o profile.safetensors"));
            says(&message, &[file, "posix.system"]);
        }
        // Looking at it runs nothing either.
        let outcome = lab.run(&format!("inspect {file}"));
        assert!(outcome.code <= 1, "{outcome:?}");
    }
    assert!(!lab.names().contains(&"marker".to_owned()), "{:?}", lab.names());
}

/// Commands that read a profile find what import would have refused.
#[test]
fn profiles_changed_after_import() {
    let lab = Lab::with(&rows());
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    let whole = lab.read("profile.safetensors");
    let commands = [
        "stats bad.safetensors --json",
        "traffic bad.safetensors placement.json",
        "place bad.safetensors --ranks 4 -o new.json",
        "prune bad.safetensors placement.json --max-ranks 2",
        "report bad.safetensors -o new.html",
    ];
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        lab.write("bad.safetensors", &whole[..length]);
        for command in commands {
            says(&lab.refused(1, command), &["bad.safetensors"]);
        }
    }
    // The expert ids of the second layer: find its first row (u16) and let it name an expert that is not there.
    let ids = &rows().sets(1);
    let bytes: Vec<u8> = ids.iter().flatten().flat_map(|&e| (e as u16).to_le_bytes()).collect();
    let position = whole.windows(bytes.len()).position(|w| w == bytes).expect("ids are stored row by row");
    let mut bad = whole.clone();
    bad[position + 2 * K * 9] = 200;
    lab.write("bad.safetensors", bad);
    for command in commands {
        says(&lab.refused(1, command), &["bad.safetensors", "layer 1", "row 9", "200"]);
    }
}

#[test]
fn placements_that_are_none() {
    let lab = Lab::with(&rows());
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    let good = lab.text("placement.json");
    for (from, to, parts) in [
        ("[0,1]", "[0,99]", ["layer 0", "99"]),
        ("[0,1]", "[0,0]", ["layer 0", "0"]),
        ("[0,1]", "[0]", ["layer 0", "1"]),
        ("[0,1]", "[0,-1]", ["layer 0", "-1"]),
        ("\"num_ranks\": 4", "\"num_ranks\": 5", ["layer 0", "num_ranks is 5"]),
        ("\"num_experts\": 8", "\"num_experts\": 9", ["layer 0", "8"]),
        ("placement.v1", "placement.v9", ["placement.v9", "expected"]),
        ("\"layers\": [", "\"layers\": {", ["JSON", "line"]),
    ] {
        assert!(good.contains(from), "{from} in {good}");
        lab.write("bad.json", good.replacen(from, to, 1));
        for command in [
            "traffic profile.safetensors bad.json",
            "export bad.json --format vllm -o map.json",
            "prune profile.safetensors bad.json --max-ranks 2",
            "report profile.safetensors bad.json -o page.html",
        ] {
            let message = lab.refused(1, command);
            says(&message, &["bad.json"]);
            says(&message, &parts);
        }
    }
    lab.write("bad.json", &good[..good.len() / 2]);
    says(&lab.refused(1, "traffic profile.safetensors bad.json"), &["bad.json", "broken JSON"]);
}

#[test]
fn files_of_no_known_format() {
    let lab = Lab::with(&rows());
    lab.write("notes.txt", "nothing to see here\n");
    lab.write("noise.bin", Vec::from_iter((0..4000_u32).map(|i| ((i * i) >> 3) as u8)));
    lab.write("folder/readme", "empty\n");
    for file in ["notes.txt", "noise.bin", "folder"] {
        says(&lab.refused(1, &format!("import {file} -o out.safetensors")), &[file]);
        lab.ok(&format!("inspect {file}"));
    }
    says(
        &lab.refused(1, "import profile.safetensors -o out.safetensors"),
        &["profile.safetensors", "already"],
    );
}
