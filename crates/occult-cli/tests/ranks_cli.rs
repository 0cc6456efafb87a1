//! Commands that run a model, with its experts over ranks: what one process gives.

mod common;

use std::fs;
use std::path::Path;

use common::models::{Dir, done, fails, model};
#[cfg(feature = "mpi")]
use common::room::{Room, strs};
use occult_formats::{Columns, Profile};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Largest difference of logits, as a part of their range.
const LIMIT: f32 = 2e-4;

/// A file of sequences of these lengths.
fn ids(dir: &Dir, lengths: &[usize]) -> String {
    let one = |(i, &n): (usize, &usize)| (0..n).map(|t| (t * 7 + i * 13) % 60 + 1).collect::<Vec<_>>();
    let sequences: Vec<_> = lengths.iter().enumerate().map(one).collect();
    dir.write("ids.json", &json!(sequences).to_string())
}

/// `logits` and `expert_ids` of a file of `occult logits`.
fn logits(path: &str) -> (Vec<f32>, Vec<u8>) {
    let bytes = fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let logits = file.tensor("logits").expect("logits").data().as_chunks().0.iter();
    let ids = file.tensor("expert_ids").expect("expert_ids").data().to_vec();
    (logits.map(|&c| f32::from_le_bytes(c)).collect(), ids)
}

fn assert_equal(got: &str, want: &str, what: &str) {
    let ((got, got_ids), (want, want_ids)) = (logits(got), logits(want));
    let low = want.iter().copied().fold(f32::INFINITY, f32::min);
    let high = want.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert_eq!((got.len(), &got_ids), (want.len(), &want_ids), "{what}");
    let off = got.iter().zip(&want).fold(0f32, |a, (g, w)| a.max((g - w).abs())) / (high - low);
    assert!(off <= LIMIT, "{what}: logits differ by {off:.1e} of their range");
}

#[test]
fn logits_of_four_ranks_are_those_of_one() {
    let dir = Dir::new();
    let ids = ids(&dir, &[5, 11, 2, 11, 7]);
    let (one, four) = (dir.path("one"), dir.path("four"));
    for case in ["olmoe", "qwen2_moe-fused", "qwen3_moe", "deepseek", "deepseek_v2-lite", "mixtral-f16"] {
        done(&["logits", &model(case), "--ids", &ids, "--out", &one]);
        for rows in ["3", "1024"] {
            for more in [&["--mode", "dedup"][..], &["--mode", "conventional"], &["--overlap", "2"]] {
                let args = ["logits", &model(case), "--ids", &ids, "--out", &four, "--batch-tokens", rows];
                done(&[&args[..], &["--ranks", "4"], more].concat());
                assert_equal(&four, &one, &format!("{case} {rows} {more:?}"));
            }
        }
    }
}

#[test]
fn placements_come_from_a_file_or_a_profile() {
    let dir = Dir::new();
    let ids = ids(&dir, &[30, 30, 30]);
    let (model, one, out) = (model("olmoe"), dir.path("one"), dir.path("out"));
    let (profile, placement) = (dir.path("profile.safetensors"), dir.path("placement.json"));
    done(&["profile", &model, "--ids", &ids, "-o", &profile]);
    done(&["place", &profile, "--ranks", "3", "--replicas", "2", "-o", &placement]);
    done(&["logits", &model, "--ids", &ids, "--out", &one]);
    // The number of ranks is the placement's.
    done(&["logits", &model, "--ids", &ids, "--out", &out, "--placement", &placement]);
    assert_equal(&out, &one, "placement file");
    done(&["logits", &model, "--ids", &ids, "--out", &out, "--place-by", &profile, "--ranks", "2"]);
    assert_equal(&out, &one, "placement from a profile");
    let limited = |max: &str| {
        let args = ["logits", &model, "--ids", &ids, "--out", &out, "--placement", &placement];
        done(&[&args[..], &["--max-ranks", max]].concat());
        logits(&out)
    };
    assert_eq!(limited("3").1, logits(&one).1);
    assert_ne!(limited("1").1, logits(&one).1, "a limit of one rank changes choices");
    let error = fails(
        &[
            "logits",
            &model,
            "--ids",
            &ids,
            "--out",
            &dir.path("no"),
            "--placement",
            &placement,
            "--ranks",
            "2",
        ],
        1,
    );
    assert!(error.contains("on 2 ranks, found") && error.contains("on 3 ranks"), "{error}");
    let error = fails(&["logits", &model, "--ids", &ids, "--out", &dir.path("no"), "--max-ranks", "1"], 2);
    assert!(error.contains("--max-ranks needs ranks"), "{error}");
    assert_eq!(dir.names(), ["ids.json", "one", "out", "placement.json", "profile.safetensors"]);
}

#[test]
fn profiles_of_four_ranks_have_the_rows_of_one() {
    let dir = Dir::new();
    let (first, second) = (ids(&dir, &[40, 9, 23]), dir.path("more.json"));
    fs::rename(&first, &second).expect("renamed");
    let first = ids(&dir, &[17, 64]);
    let case = model("deepseek_v2-groups-bf16");
    let profile = |name: &str, ranks: &str| {
        let out = dir.path(name);
        let args = ["profile", &case, "--ids", &first, &second, "-o", &out, "--context", "16"];
        done(&[&args[..], &["--batch-tokens", "8", "--ranks", ranks, "--model-name", "m"]].concat());
        Profile::open(Path::new(&out)).expect("a profile")
    };
    let (one, four) = (profile("one", "1"), profile("four", "4"));
    assert_eq!(one.meta(), four.meta());
    let columns = Columns { weights: true, scores: true, domains: true };
    for layer in 0..one.num_layers() {
        let rows = one.num_rows(layer).expect("token rows");
        assert_eq!(four.num_rows(layer), Some(rows));
        let read = |p: &Profile| p.read_rows(layer, columns, rows).expect("rows");
        let (one, four) = (read(&one), read(&four));
        assert_eq!(one.routing.expert_ids, four.routing.expert_ids);
        assert_eq!(one.domains, four.domains);
        let scores = one.routing.scores.iter().flatten().zip(four.routing.scores.iter().flatten());
        assert!(scores.clone().count() > 0 && scores.into_iter().all(|(a, b)| (a - b).abs() < 1e-3));
    }
}

#[test]
fn texts_and_scores_of_ranks_are_those_of_one() {
    let dir = Dir::new();
    let ids = ids(&dir, &[6, 3, 9, 12, 4]);
    for case in ["olmoe", "mixtral-window-fused"] {
        let run = |ranks: &str| {
            let text =
                done(&["generate", &model(case), "--ids", &ids, "--max-tokens", "7", "--ranks", ranks]);
            let eval =
                done(&["eval", &model(case), "--ids", &ids, "--context", "5", "--json", "--ranks", ranks]);
            let eval: Value = serde_json::from_str(&eval).expect("JSON");
            (
                text,
                eval["total"]["perplexity"].as_f64().expect("a perplexity"),
                eval["total"]["tokens"].clone(),
            )
        };
        let one = run("1");
        assert_eq!(one.0.lines().count(), 5);
        for ranks in ["2", "3", "8"] {
            let many = run(ranks);
            assert_eq!((&many.0, &many.2), (&one.0, &one.2), "{case}, {ranks} ranks");
            assert!((many.1 / one.1 - 1.0).abs() < 1e-4, "{} and {}", many.1, one.1);
        }
    }
}

#[test]
fn a_failure_of_one_rank_names_it_and_leaves_no_file() {
    let dir = Dir::new();
    let ids = ids(&dir, &[5, 5]);
    // An expert of rank 1 that is not finite.
    let broken = dir.path("broken");
    fs::create_dir(&broken).expect("a directory");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(&model("olmoe")).join(name), Path::new(&broken).join(name)).expect("copied");
    }
    let weights = Path::new(&broken).join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let name = "model.layers.1.mlp.experts.12.down_proj.weight";
    let at = {
        let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
        tensors.tensor(name).expect(name).data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).expect("written");
    let out = dir.path("out");
    let error = fails(&["logits", &broken, "--ids", &ids, "--out", &out, "--ranks", "2"], 1);
    assert!(error.contains("rank 1: ") && error.contains(name), "{error}");
    assert_eq!(dir.names(), ["broken", "ids.json"]);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_says_so() {
    let dir = Dir::new();
    let ids = ids(&dir, &[5]);
    let args = ["logits", &model("olmoe"), "--ids", &ids, "--out", &dir.path("out"), "--comm", "mpi"];
    assert!(fails(&args, 2).contains("--features mpi"));
}

#[cfg(feature = "mpi")]
mod mpi {
    use std::process::{Command, Output};

    use super::*;

    /// Three processes by `mpirun`, or what `OCCULT_MPIRUN` names; killed after a minute.
    fn launch(args: &[&str]) -> Output {
        let launcher = std::env::var("OCCULT_MPIRUN").unwrap_or_else(|_| "mpirun".into());
        let version = Command::new(&launcher).arg("--version").output().expect("the MPI launcher starts");
        let mut command = Command::new("timeout");
        command.args(["-k", "3", "60", &launcher]);
        if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
            command.arg("--oversubscribe");
            // Containers of build machines run as root.
            command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        }
        command.args(["-n", "3", env!("CARGO_BIN_EXE_occult")]).args(args);
        command.output().expect("`timeout` starts")
    }

    /// Standard output of three processes that must succeed: the first one's.
    fn run(args: &[&str]) -> String {
        let out = launch(&[args, &["--comm", "mpi"]].concat());
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("UTF-8")
    }

    fn json_of(text: &str) -> Value {
        serde_json::from_str(text).expect("JSON")
    }

    #[test]
    #[ignore = "needs an MPI launcher"]
    fn processes_give_what_one_gives() {
        let dir = Dir::new();
        let ids = ids(&dir, &[5, 11, 2, 11, 7]);
        let (model, one, three) = (model("qwen2_moe-fused"), dir.path("one"), dir.path("three"));
        done(&["logits", &model, "--ids", &ids, "--out", &one]);
        run(&["logits", &model, "--ids", &ids, "--out", &three]);
        assert_equal(&three, &one, "three processes");
        let generate = ["generate", &model, "--ids", &ids, "--max-tokens", "5"];
        assert_eq!(run(&generate), done(&generate));
        let profile = |name: &str| ["profile", &model, "--ids", &ids, "-o", name].map(str::to_owned);
        let (a, b) = (profile(&dir.path("a")), profile(&dir.path("b")));
        done(&a.each_ref().map(String::as_str));
        run(&b.each_ref().map(String::as_str));
        let rows = |path: &str| {
            let profile = Profile::open(Path::new(path)).expect("a profile");
            let n = profile.num_rows(0).expect("rows");
            profile.read_rows(0, Columns::IDS, n).expect("rows").routing.expert_ids
        };
        assert_eq!(rows(&dir.path("a")), rows(&dir.path("b")));
        let eval = ["eval", &model, "--ids", &ids, "--context", "5", "--json"];
        let (one, three) = (json_of(&done(&eval)), json_of(&run(&eval)));
        assert_eq!(three["total"]["tokens"], one["total"]["tokens"]);
        let perplexity = |of: &Value| of["total"]["perplexity"].as_f64().expect("a perplexity");
        assert!((perplexity(&three) / perplexity(&one) - 1.0).abs() < 1e-4, "{three} and {one}");
    }

    #[test]
    #[ignore = "needs an MPI launcher"]
    fn processes_send_what_threads_send() {
        let eval = |world: fn(&[&str]) -> String, more: &[&str]| {
            let dir = Dir::new();
            let ids = ids(&dir, &[5, 11, 2, 11, 7]);
            json_of(&world(&[&["eval", &model("olmoe"), "--ids", &ids, "--json"], more].concat()))
        };
        let (processes, threads) = (eval(run, &[]), eval(done, &["--ranks", "3"]));
        for key in ["copies_per_token", "sent_rows_per_token", "sent_bytes_per_token"] {
            assert!(threads[key].as_f64().is_some_and(|n| n > 0.0), "{threads}");
            assert_eq!(processes[key], threads[key], "{key}");
        }
        let layer = "bench layer --json --tokens 40 --hidden 16 --ffn 8 --experts 16 --top-k 4 --reps 1 --overlap on --backward";
        let layer: Vec<&str> = layer.split(' ').collect();
        let (processes, threads) = (run(&layer), done(&[&layer[..], &["--ranks", "3"]].concat()));
        let (processes, threads) = (json_of(&processes), json_of(&threads));
        assert_eq!((&processes["ranks"], &threads["ranks"]), (&json!(3), &json!(3)));
        let modes = |of: &Value| of["modes"].as_array().expect("modes").clone();
        assert_eq!((modes(&processes).len(), modes(&threads).len()), (5, 5));
        for (of, like) in modes(&processes).iter().zip(&modes(&threads)) {
            for key in
                ["mode", "copies_per_token", "forward_wire_bytes", "wire_bytes", "predicted_wire_bytes"]
            {
                assert_eq!(of[key], like[key], "{key} of {} of threads", like["mode"]);
            }
            assert!(
                of["wire_bytes"].as_u64() > Some(0) && of["wire_bytes"] == of["predicted_wire_bytes"],
                "{of}"
            );
        }
    }

    #[test]
    #[ignore = "needs an MPI launcher"]
    fn processes_train_and_go_on_to_the_bit() {
        let room = Room::new();
        let tune = |out: &str, more: &[&str]| room.args("tune", out, &[&["--max-ranks", "2"], more].concat());
        run(&strs(&tune("whole", &[])));
        run(&strs(&tune("parts", &["--stop-after", "3"])));
        run(&strs(&tune("parts", &["--resume"])));
        assert_eq!(room.weights("parts"), room.weights("whole"));
        done(&strs(&tune("threads", &["--ranks", "3"])));
        assert_eq!(room.weights("threads"), room.weights("whole"), "ranks are ranks");
    }

    #[test]
    #[ignore = "needs an MPI launcher"]
    fn another_number_of_processes_is_fails() {
        let dir = Dir::new();
        let ids = ids(&dir, &[5]);
        let out = dir.path("out");
        let args = ["logits", &model("olmoe"), "--ids", &ids, "--out", &out, "--comm", "mpi", "--ranks", "2"];
        let output = launch(&args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.status.code() != Some(124), "{text}");
        assert!(text.contains("--ranks 2, but mpirun started 3 processes"), "{text}");
        let output = launch(&args[..6]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("give --comm mpi"), "{text}");
        assert_eq!(dir.names(), ["ids.json"]);
    }
}
