//! Array files, written by hand.

use std::io::Write as _;

use serde_json::{Map, json};

/// An array of a safetensors or npz file.
pub(crate) struct Array {
    name: String,
    dtype: &'static str,
    numpy: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Array {
    pub(crate) fn i32(name: &str, shape: &[usize], values: impl IntoIterator<Item = i32>) -> Self {
        let bytes = values.into_iter().flat_map(i32::to_le_bytes).collect();
        Self::new(name, ["I32", "<i4"], shape, 4, bytes)
    }

    pub(crate) fn f32(name: &str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self::new(name, ["F32", "<f4"], shape, 4, bytes)
    }

    fn new(name: &str, types: [&'static str; 2], shape: &[usize], size: usize, bytes: Vec<u8>) -> Self {
        assert_eq!(bytes.len(), size * shape.iter().product::<usize>(), "{name} {shape:?}");
        Self { name: name.to_owned(), dtype: types[0], numpy: types[1], shape: shape.to_vec(), bytes }
    }

    pub(crate) fn npy(&self) -> Vec<u8> {
        let shape: Vec<String> = self.shape.iter().map(|d| format!("{d},")).collect();
        let header = format!(
            "{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}\n",
            self.numpy,
            shape.join(" ")
        );
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        out.extend((header.len() as u16).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(&self.bytes);
        out
    }
}

pub(crate) fn npz(arrays: &[Array]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for array in arrays {
        let options =
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        zip.start_file(format!("{}.npy", array.name), options).unwrap();
        zip.write_all(&array.npy()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

pub(crate) fn safetensors(arrays: &[Array], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let metadata: Map<_, _> = metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut offset = 0;
    for a in arrays {
        let end = offset + a.bytes.len();
        let entry = json!({ "dtype": a.dtype, "shape": a.shape, "data_offsets": [offset, end] });
        header.insert(a.name.clone(), entry);
        offset = end;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(&header);
    arrays.iter().for_each(|a| out.extend(&a.bytes));
    out
}
