//! What a model is asked to do.

use super::*;

#[test]
fn prompt_is_longer_than_the_context() {
    let model = load("olmoe"); // context 64
    let prompt = vec![5; 65];
    let mut go = |_| Ok(std::ops::ControlFlow::Continue(()));
    let error = generate(&model, &prompt, &GenerateOptions::default(), &mut go).expect_err("too long");
    assert_eq!(error.to_string(), "the prompt has 65 tokens, the model's context is 64");
    let batch = Batch::single(&prompt).expect("batch");
    let error = model.forward(&batch, None, Logits::All, None).expect_err("too long").to_string();
    assert!(error.contains("65 tokens are more than the model's context of 64"), "{error}");
    // A padded batch is as long as its longest sequence, and the cache counts.
    let mut cache = model.new_cache();
    let batch = Batch::single(&prompt[..60]).expect("batch");
    model.forward(&batch, Some(&mut cache), Logits::Last, None).expect("fits");
    let error = model.forward(&Batch::single(&[5; 5]).expect("batch"), Some(&mut cache), Logits::Last, None);
    assert!(error.expect_err("full").to_string().contains("65 tokens"));
}

#[test]
fn ids_outside_the_vocabulary() {
    let batch = Batch::single(&[5, 96]).expect("batch");
    let error = load("olmoe").forward(&batch, None, Logits::All, None).expect_err("no such id");
    assert_eq!(error.to_string(), "token id 96 is outside the vocabulary of 96");
}

#[test]
fn sequences_without_tokens() {
    assert!(Batch::new::<Vec<u32>>(&[]).is_err());
    assert!(Batch::new(&[vec![1], vec![]]).is_err());
}
