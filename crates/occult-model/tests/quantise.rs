//! Quantised model directories: what is written, what is read back, how close the logits stay.

mod common;

use std::fs;
use std::path::Path;

use common::{CASES, Reference, difference, dir, load_dir, values};
use occult_model::quant::{Format, Layout};
use occult_model::{Batch, ConvertOptions, LoadOptions, Logits, ModelFiles, StoredDtype, Threads};
use occult_model::{convert, permute, quantise};
use occult_plan::{LayerPlacement, Placement, Topology};

fn quantised(case: &str, format: Format, to: &Path) {
    quantise(&dir(case), to, format, &Threads::new(2), &mut |_, _| ())
        .unwrap_or_else(|e| panic!("{case}: {e}"));
}

fn logits(path: &Path, case: &str) -> Vec<f32> {
    let batch = Batch::new(&Reference::of(case).sequences()).expect("batch");
    values(&load_dir(path).forward(&batch, None, Logits::All, None).expect("logits"))
}

/// Median difference over the root mean square of the values around their mean.
fn relative_median(got: &[f32], want: &[f32]) -> f64 {
    let mut differences: Vec<f64> = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs())).collect();
    differences.sort_by(f64::total_cmp);
    let mean = want.iter().map(|&v| f64::from(v)).sum::<f64>() / want.len() as f64;
    let variance = want.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / want.len() as f64;
    differences[differences.len() / 2] / variance.sqrt()
}

/// Root of the mean squared difference over that of the values around their mean.
fn relative_rms(got: &[f32], want: &[f32]) -> f64 {
    let mean = want.iter().map(|&v| f64::from(v)).sum::<f64>() / want.len() as f64;
    let squares = |a: &mut dyn Iterator<Item = f64>| a.map(|v| v * v).sum::<f64>();
    let error = squares(&mut got.iter().zip(want).map(|(g, w)| f64::from(g - w)));
    (error / squares(&mut want.iter().map(|&w| f64::from(w) - mean))).sqrt()
}

#[test]
fn logits_of_every_family_stay_near() {
    let temp = tempfile::tempdir().expect("temp");
    for case in CASES {
        let want = logits(&dir(case), case);
        for (format, most) in [(Format::Q8, 0.08), (Format::Q4, 0.8)] {
            let out = temp.path().join(format!("{case}-{}", format.name()));
            quantised(case, format, &out);
            let got = logits(&out, case);
            // Tiny models choose other experts when their scores move a little: the middle of the differences says more
            // than their mean square, and the bounds are wide. Unrelated logits have 0.95.
            let error = relative_median(&got, &want);
            eprintln!("{case} {}: {error:.4}", format.name());
            assert!(error < most && error > 1e-5, "{case} {}: {error}", format.name());
        }
    }
}

#[test]
fn widening_gives_the_weights_that_the_report_speaks_of() {
    let temp = tempfile::tempdir().expect("temp");
    let case = "olmoe";
    let (q, wide) = (temp.path().join("q"), temp.path().join("wide"));
    let report = quantise(&dir(case), &q, Format::Q8, &Threads::new(1), &mut |_, _| ()).expect("quantise");
    convert(
        &q,
        &wide,
        &ConvertOptions { dtype: Some(StoredDtype::F32), ..ConvertOptions::default() },
        &mut |_, _| (),
    )
    .expect("widen");
    let open = |d: &Path| ModelFiles::open(d, LoadOptions::default()).expect("open");
    let (original, quantised, widened) = (open(&dir(case)), open(&q), open(&wide));
    let (mut error, mut size, mut seen) = (0.0, 0.0, 0);
    for info in original.names().tensors(original.spec()) {
        let get = |f: &ModelFiles| f.checkpoint().weight(&info.name).expect("tensor").to_f32();
        let (a, b, c) = (get(&original), get(&quantised), get(&widened));
        assert_eq!(b, c, "{}", info.name);
        let is_quantised =
            quantised.checkpoint().weight(&info.name).expect("tensor").quant_layout().is_some();
        let kept =
            info.shape.len() == 1 || info.name.contains("embed") || info.name.ends_with("mlp.gate.weight");
        assert_eq!(is_quantised, !kept, "{}", info.name);
        if kept {
            assert_eq!(a, b, "{}", info.name);
        } else {
            seen += 1;
            error += a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            size += a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
        }
    }
    assert_eq!(report.iter().map(|c| c.num_tensors).sum::<usize>(), seen);
    let said = report.iter().map(|c| c.error.squared_error).sum::<f64>()
        / report.iter().map(|c| c.error.squared).sum::<f64>();
    assert!((said / (error / size) - 1.0).abs() < 1e-5, "{said} and {}", error / size);
    for class in &report {
        let rms = class.error.relative_rms();
        assert!(rms > 0.002 && rms < 0.01 && class.worst_relative_rms >= rms, "{class:?}");
        assert!(original.checkpoint().contains(&class.worst), "{class:?}");
    }
    // 8-bit weights with f32 activations: nearer to the original than with activations of 8 bits.
    let want = logits(&dir(case), case);
    let (both, weights) = (relative_rms(&logits(&q, case), &want), relative_rms(&logits(&wide, case), &want));
    assert!(weights < both, "{weights} and {both}");
}

#[test]
fn stacked_experts_and_several_files_give_the_same_matrices() {
    let temp = tempfile::tempdir().expect("temp");
    let (fused, a, b) = (temp.path().join("fused"), temp.path().join("a"), temp.path().join("b"));
    let options = ConvertOptions { layout: occult_model::hf::ExpertLayout::Fused, dtype: None };
    convert(&dir("qwen2_moe-sharded-bf16"), &fused, &options, &mut |_, _| ()).expect("fused");
    quantised("qwen2_moe-sharded-bf16", Format::Q4, &a);
    quantise(&fused, &b, Format::Q4, &Threads::new(2), &mut |_, _| ()).expect("quantise");
    assert!(a.join("model.safetensors.index.json").is_file());
    assert_eq!(logits(&a, "qwen2_moe-sharded-bf16"), logits(&b, "qwen2_moe-sharded-bf16"));
    assert_eq!(difference(&logits(&a, "qwen2_moe-sharded-bf16"), &logits(&b, "qwen2_moe-sharded-bf16")), 0.0);
}

#[test]
fn what_cannot_be_done_with_quantised_weights_is_said() {
    let temp = tempfile::tempdir().expect("temp");
    let (q, out) = (temp.path().join("q"), temp.path().join("out"));
    quantised("mixtral-f16", Format::Q8, &q);
    let is = |error: occult_model::ModelError| {
        assert!(error.to_string().contains("is quantised"), "{error}");
        assert!(!out.exists());
    };
    is(convert(&q, &out, &ConvertOptions::default(), &mut |_, _| ()).expect_err("copy"));
    is(quantise(&q, &out, Format::Q4, &Threads::new(1), &mut |_, _| ()).expect_err("again"));
    let even = LayerPlacement::from_rank_experts(8, &[[0u16, 2, 4, 6], [1, 3, 5, 7]]).expect("even");
    let placement = Placement::new(Topology::new(2, 1).expect("topology"), vec![even; 2]).expect("placement");
    is(permute(&q, &placement, &out, None, &mut |_, _| (), &mut |_, _| Ok(())).expect_err("permute"));
    let config = fs::read_to_string(q.join("config.json")).expect("config");
    assert!(config.contains("\"quant_method\": \"occult\""), "{config}");
}

/// Changes the header of the only file of a directory, same length.
fn patch(path: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let file = path.join("model.safetensors");
    let mut bytes = fs::read(&file).expect("file");
    let at =
        bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(&file, bytes).expect("write");
}

#[test]
fn broken_directories_are_refused_with_the_tensor() {
    let temp = tempfile::tempdir().expect("temp");
    let good = temp.path().join("good");
    quantised("olmoe", Format::Q8, &good);
    let name = "model.layers.0.self_attn.q_proj.weight";
    for (from, to, word) in [
        (format!("{name}.scales"), format!("{name}.scalez"), "scales"),
        (format!("{name}.shape"), format!("{name}.shapf"), "shape"),
        (format!("{name}.q8"), format!("{name}.q4"), "has levels"),
        (format!("{name}.q8"), format!("{name}.q7"), "is missing"),
    ] {
        let bad = temp.path().join("bad");
        fs::create_dir_all(&bad).expect("dir");
        for file in ["config.json", "model.safetensors"] {
            fs::copy(good.join(file), bad.join(file)).expect("copy");
        }
        patch(&bad, &format!("\"{from}\""), &format!("\"{to}\""));
        let error = ModelFiles::open(&bad, LoadOptions::default()).expect_err(word).to_string();
        assert!(error.contains(word) && error.contains("q_proj"), "{error}");
    }
    // A scale that is not finite: found when the weight is loaded.
    let bad = temp.path().join("bad");
    fs::copy(good.join("model.safetensors"), bad.join("model.safetensors")).expect("copy");
    let file = bad.join("model.safetensors");
    let mut bytes = fs::read(&file).expect("file");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("length")) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("header");
    let offset = json[format!("{name}.scales")]["data_offsets"][0].as_u64().expect("offset") as usize;
    bytes[8 + header + offset..][..2].copy_from_slice(&0x7f80u16.to_le_bytes());
    fs::write(&file, bytes).expect("write");
    let files = ModelFiles::open(&bad, LoadOptions::default()).expect("headers are good");
    let error = files.load().expect_err("infinite scale").to_string();
    assert!(error.contains("scale 0 is inf") && error.contains("q_proj"), "{error}");
    assert_eq!(Layout::DEFAULT_GROUP, 32);
}
