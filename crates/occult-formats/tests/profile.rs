//! What is written to a profile is what is read from it.

mod common;

use common::Folder;
use occult_formats::{Columns, Profile, ProfileMeta, ProfileWriter};
use occult_plan::{CoActivation, Routing, RoutingBuf, tokens_per_expert};

fn meta(num_experts: usize, top_k: usize, layers: u32) -> ProfileMeta {
    ProfileMeta {
        num_experts,
        top_k: Some(top_k),
        layer_ids: (0..layers).map(|l| 2 * l + 1).collect(),
        num_hidden_layers: Some(2 * layers + 1),
        domains: vec!["a".to_owned(), "b".to_owned(), "c".to_owned()],
        ..ProfileMeta::default()
    }
}

/// Rows that depend on nothing but their number.
fn rows(seed: usize, n: usize, e: usize, k: usize) -> (RoutingBuf, Vec<u16>) {
    let mut buf = RoutingBuf { num_experts: e, top_k: k, ..RoutingBuf::default() };
    let (mut weights, mut scores, mut occurrences, mut domains) = (vec![], vec![], vec![], vec![]);
    for row in 0..n {
        let start = (row * 31 + seed * 7) % e;
        // Consecutive ids modulo a step that shares no factor with the number of experts are distinct.
        for i in 0..k {
            buf.expert_ids.push(((start + i * 5) % e) as u16);
            weights.push(1.0 / (1 + i + row % 3) as f32);
        }
        scores.extend((0..e).map(|j| (row + j * seed) as f32 * 0.25 - 3.0));
        occurrences.push(1 + (row % 5) as u32);
        domains.push((row % 3) as u16);
    }
    buf.weights = Some(weights);
    buf.scores = Some(scores);
    buf.occurrences = Some(occurrences);
    (buf, domains)
}

fn slice(buf: &RoutingBuf, from: usize, to: usize) -> RoutingBuf {
    let (e, k) = (buf.num_experts, buf.top_k);
    RoutingBuf {
        num_experts: e,
        top_k: k,
        expert_ids: buf.expert_ids[from * k..to * k].to_vec(),
        weights: buf.weights.as_ref().map(|w| w[from * k..to * k].to_vec()),
        scores: buf.scores.as_ref().map(|s| s[from * e..to * e].to_vec()),
        occurrences: buf.occurrences.as_ref().map(|o| o[from..to].to_vec()),
    }
}

#[test]
fn rows_counts_and_coactivation_come_back() {
    let folder = Folder::new();
    let (e, k) = (16, 4);
    let sizes = [10_007, 1, 333];
    let mut writer = ProfileWriter::create(&folder.output(), meta(e, k, 3)).unwrap();
    let layers: Vec<_> = sizes.iter().enumerate().map(|(l, &n)| rows(l, n, e, k)).collect();
    // Layers interleave, in pieces of odd sizes.
    for piece in 0..101 {
        for (l, (buf, domains)) in layers.iter().enumerate() {
            let n = sizes[l];
            let (from, to) = (piece * n / 101, (piece + 1) * n / 101);
            let part = slice(buf, from, to);
            writer.append(l, &part.view().unwrap(), Some(&domains[from..to])).unwrap();
        }
    }
    let written = writer.finish().unwrap();
    let profile = Profile::open(&folder.output()).unwrap();
    assert_eq!(profile.meta(), &written);
    assert_eq!(profile.meta(), &meta(e, k, 3));
    assert_eq!(folder.left_in_output(), ["profile.safetensors"]);
    for (l, (buf, domains)) in layers.iter().enumerate() {
        let routing = buf.view().unwrap();
        assert_eq!(profile.num_rows(l), Some(sizes[l]));
        assert_eq!(profile.counts(l).unwrap(), tokens_per_expert(&routing));
        assert_eq!(profile.coactivation(l).unwrap(), Some(CoActivation::of(&routing)));
        let all = profile.read_rows(l, Columns::ALL, usize::MAX).unwrap();
        assert_eq!(&all.routing, buf);
        assert_eq!(all.domains.as_ref(), Some(domains));
        let mut seen = RoutingBuf { weights: Some(vec![]), ..RoutingBuf::default() };
        let columns = Columns { weights: true, ..Columns::IDS };
        let mut next = 0;
        profile
            .for_each_chunk(l, columns, 1000, &mut |chunk| {
                assert_eq!(chunk.first_row, next);
                next += chunk.routing.num_tokens();
                assert!(chunk.routing.scores().is_none() && chunk.domains.is_none());
                seen.expert_ids.extend(chunk.routing.expert_ids());
                seen.weights.as_mut().unwrap().extend(chunk.routing.weights().unwrap());
                Ok(())
            })
            .unwrap();
        assert_eq!((seen.expert_ids, seen.weights), (buf.expert_ids.clone(), buf.weights.clone()));
    }
}

#[test]
fn sampled_rows_are_the_rows_they_say_they_are() {
    let folder = Folder::new();
    let (buf, domains) = rows(3, 9001, 16, 4);
    let mut writer = ProfileWriter::create(&folder.output(), meta(16, 4, 1)).unwrap();
    writer.append(0, &buf.view().unwrap(), Some(&domains)).unwrap();
    writer.finish().unwrap();
    let profile = Profile::open(&folder.output()).unwrap();
    // Close together (read through) and far apart (fetched one by one).
    for n in [7000, 100, 1, 0] {
        let some = profile.read_rows(0, Columns::ALL, n).unwrap();
        assert_eq!((some.routing.num_tokens(), some.total_rows), (n, 9001));
        for i in 0..n {
            let row = some.source_row(i);
            assert_eq!(slice(&some.routing, i, i + 1), slice(&buf, row, row + 1));
            assert_eq!(some.domains.as_ref().unwrap()[i], domains[row]);
        }
    }
}

#[test]
fn other_readers_of_safetensors_can_read_it() {
    let folder = Folder::new();
    let (buf, domains) = rows(1, 50, 16, 4);
    let mut writer = ProfileWriter::create(&folder.output(), meta(16, 4, 1)).unwrap();
    writer.append(0, &buf.view().unwrap(), Some(&domains)).unwrap();
    writer.finish().unwrap();
    let bytes = std::fs::read(folder.output()).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("layers.0.expert_ids").unwrap();
    assert_eq!((ids.shape(), ids.dtype()), (&[50, 4][..], safetensors::Dtype::U16));
    let expected: Vec<u8> = buf.expert_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    assert_eq!(ids.data(), expected);
    for (name, tensor) in file.tensors() {
        let width = tensor.data().len() / tensor.shape().iter().product::<usize>();
        let offset = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(offset.is_multiple_of(width), "{name} is not aligned");
    }
}

#[test]
fn counts_only_and_order_only() {
    let folder = Folder::new();
    let mut writer = ProfileWriter::create(&folder.output(), meta(3, 2, 2)).unwrap();
    let graph = CoActivation::from_counts(3, vec![0, 5, 1, 5, 0, 2, 1, 2, 0]).unwrap();
    writer.set_counts(0, vec![6, 7, 3], Some(graph.clone())).unwrap();
    writer.set_order(1, vec![1, 2, 0, 2, 1, 0]).unwrap();
    writer.finish().unwrap();
    let profile = Profile::open(&folder.output()).unwrap();
    assert_eq!(profile.counts(0).unwrap(), [6, 7, 3]);
    assert_eq!(profile.coactivation(0).unwrap(), Some(graph));
    assert_eq!(profile.collaborator_order(1).unwrap().unwrap(), [1, 2, 0, 2, 1, 0]);
    assert_eq!((profile.num_rows(0), profile.num_rows(1)), (None, None));
    let message = profile.counts(1).unwrap_err().to_string();
    assert!(message.contains("layer 1") && message.contains("order"), "{message}");
    let message = profile.read_rows(0, Columns::IDS, 5).unwrap_err().to_string();
    assert!(message.contains("layer 0") && message.contains("no expert sets"), "{message}");
}

#[test]
fn a_writer_that_is_dropped_or_fails_leaves_nothing() {
    let folder = Folder::new();
    let (buf, domains) = rows(1, 50, 16, 4);
    let mut writer = ProfileWriter::create(&folder.output(), meta(16, 4, 2)).unwrap();
    writer.append(0, &buf.view().unwrap(), Some(&domains)).unwrap();
    drop(writer);
    assert_eq!(folder.left_in_output(), [""; 0]);
    let mut writer = ProfileWriter::create(&folder.output(), meta(16, 4, 2)).unwrap();
    writer.append(0, &buf.view().unwrap(), Some(&domains)).unwrap();
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("layer 1") && message.contains("layer 3 of the model"), "{message}");
    assert_eq!(folder.left_in_output(), [""; 0]);
}

#[test]
fn a_column_is_in_all_rows_or_in_none() {
    let folder = Folder::new();
    let mut writer = ProfileWriter::create(&folder.output(), meta(16, 2, 1)).unwrap();
    let routing = Routing::new(16, 2, &[0, 1, 2, 3]).unwrap();
    writer.append(0, &routing, None).unwrap();
    let message = writer.append(0, &routing, Some(&[0, 1])).unwrap_err().to_string();
    assert!(message.contains("domains"), "{message}");
    let message = writer.set_counts(0, vec![1; 16], None).unwrap_err().to_string();
    assert!(message.contains("filled already"), "{message}");
}
