//! What lies under an output's name keeps its kind: links stay links, and what is no regular file is never replaced by one.
#![cfg(unix)]

use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use occult_formats::{ProfileMeta, ProfileWriter, write_atomic};

fn write_profile(path: &Path) -> occult_formats::Result<ProfileMeta> {
    let meta = ProfileMeta { num_experts: 4, layer_ids: vec![0], ..ProfileMeta::default() };
    let mut writer = ProfileWriter::create(path, meta)?;
    writer.set_counts(0, vec![1, 2, 3, 4], None)?;
    writer.finish()
}

#[test]
fn a_link_is_written_through() {
    let dir = tempfile::tempdir().unwrap();
    let (target, link) = (dir.path().join("target"), dir.path().join("link"));
    std::fs::write(&target, "old").unwrap();
    symlink(&target, &link).unwrap();
    write_atomic(&link, b"new").unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"new");
    write_profile(&link).unwrap();
    assert!(std::fs::read(&target).unwrap().len() > 100);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[test]
fn what_is_no_regular_file_stays_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    // A socket cannot be opened for writing; a device could.
    assert!(write_atomic(&path, b"new").unwrap_err().to_string().starts_with("cannot write"));
    let message = write_profile(&path).unwrap_err().to_string();
    assert!(message.contains("socket: is not a regular file"), "{message}");
    assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
}
