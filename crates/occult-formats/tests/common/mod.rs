//! Builds input files of every format in a temporary folder.
#![allow(dead_code, reason = "each test binary uses some of these")]

use std::io::Write as _;
use std::path::{Path, PathBuf};

use occult_formats::{FormatError, ImportOptions, ImportSummary, Profile, import};
use serde_json::json;

/// An array of a test file.
#[derive(Clone)]
pub(crate) struct Array {
    pub(crate) name: &'static str,
    /// safetensors' name of the element type.
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Array {
    pub(crate) fn i32(name: &'static str, shape: &[usize], values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: "I32", shape: shape.to_vec(), bytes }
    }

    pub(crate) fn u8(name: &'static str, shape: &[usize], values: &[u8]) -> Self {
        Self { name, dtype: "U8", shape: shape.to_vec(), bytes: values.to_vec() }
    }

    pub(crate) fn i64(name: &'static str, shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: "I64", shape: shape.to_vec(), bytes }
    }

    pub(crate) fn f32(name: &'static str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: "F32", shape: shape.to_vec(), bytes }
    }

    pub(crate) fn f16(name: &'static str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        Self { name, dtype: "F16", shape: shape.to_vec(), bytes }
    }

    /// As a `.npy` file.
    pub(crate) fn npy(&self) -> Vec<u8> {
        let descr = match self.dtype {
            "I32" => "<i4",
            "U8" => "|u1",
            "I64" => "<i8",
            "F32" => "<f4",
            "F16" => "<f2",
            other => panic!("no npy type for {other}"),
        };
        npy(descr, &self.shape, &self.bytes)
    }
}

pub(crate) fn npy(descr: &str, shape: &[usize], data: &[u8]) -> Vec<u8> {
    let shape: Vec<String> = shape.iter().map(|d| format!("{d},")).collect();
    let header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}\n", shape.join(" "));
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

pub(crate) fn npz(arrays: &[Array], method: zip::CompressionMethod) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for array in arrays {
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        zip.start_file(format!("{}.npy", array.name), options).unwrap();
        zip.write_all(&array.npy()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

pub(crate) fn safetensors(arrays: &[Array], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let metadata: serde_json::Map<_, _> = metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut offset = 0;
    for a in arrays {
        let end = offset + a.bytes.len();
        header.insert(
            a.name.to_owned(),
            json!({ "dtype": a.dtype, "shape": a.shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(&header);
    arrays.iter().for_each(|a| out.extend(&a.bytes));
    out
}

/// A folder for one test.
pub(crate) struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes an input (folders in its name are made) and returns its path.
    pub(crate) fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub(crate) fn output(&self) -> PathBuf {
        std::fs::create_dir_all(self.dir.path().join("out")).unwrap();
        self.dir.path().join("out/profile.safetensors")
    }

    /// Names in the folder of the output.
    pub(crate) fn left_in_output(&self) -> Vec<String> {
        let folder = self.output();
        let entries = std::fs::read_dir(folder.parent().unwrap()).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    pub(crate) fn import(
        &self,
        inputs: &[PathBuf],
        options: &ImportOptions,
    ) -> Result<ImportSummary, FormatError> {
        import(inputs, options, &self.output(), &mut |done, total| assert!(done <= total))
    }

    /// Imports, and opens what came out.
    pub(crate) fn profile(&self, inputs: &[PathBuf], options: &ImportOptions) -> (ImportSummary, Profile) {
        let summary = self.import(inputs, options).unwrap();
        assert_eq!(self.left_in_output(), ["profile.safetensors"], "only the output may be left");
        (summary, Profile::open(&self.output()).unwrap())
    }

    /// Imports, expects an error, checks that nothing is left behind, and returns the message.
    #[track_caller]
    pub(crate) fn refused(&self, inputs: &[PathBuf], options: &ImportOptions) -> String {
        let error = self.import(inputs, options).expect_err("the import was expected to fail");
        assert_eq!(self.left_in_output(), [""; 0], "nothing may be left behind");
        error.to_string()
    }
}

pub(crate) fn experts(n: usize) -> ImportOptions {
    ImportOptions { num_experts: Some(n), ..ImportOptions::default() }
}

/// The ids of all rows of a layer.
pub(crate) fn ids(profile: &Profile, layer: usize) -> Vec<u16> {
    let columns = occult_formats::Columns::ALL;
    profile.read_rows(layer, columns, usize::MAX).unwrap().routing.expert_ids
}
