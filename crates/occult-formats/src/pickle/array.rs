//! numpy arrays inside pickles.

use super::Element;

/// A numpy array, its bytes checked against its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    pub(crate) element: Element,
    pub(crate) big_endian: bool,
    pub(crate) shape: Vec<usize>,
    pub(crate) fortran: bool,
    pub(crate) data: Vec<u8>,
}

impl Array {
    /// What `numpy.core.multiarray._reconstruct` makes before its state is set.
    pub(crate) fn empty() -> Self {
        Self { element: Element::I8, big_endian: false, shape: vec![0], fortran: false, data: Vec::new() }
    }

    /// Checks that `data` is exactly the elements of `shape`.
    pub(crate) fn new(
        (element, big_endian): (Element, bool),
        shape: Vec<usize>,
        fortran: bool,
        data: Vec<u8>,
    ) -> Result<Self, String> {
        let bytes = shape.iter().try_fold(element.size(), |n, &d| n.checked_mul(d));
        if bytes != Some(data.len()) {
            let (name, found) = (element.name(), data.len());
            return Err(format!("a numpy array of shape {shape:?} and type {name} has {found} bytes"));
        }
        Ok(Self { element, big_endian, shape, fortran, data })
    }

    /// Element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Lengths of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// All elements in C order as whole numbers; an error for floats and numbers above `i64::MAX`.
    pub fn to_i64(&self) -> Result<Vec<i64>, String> {
        let size = self.element.size();
        let read = |bytes: &[u8]| {
            self.element.to_i64(bytes, self.big_endian).ok_or_else(|| {
                format!("expected whole numbers below 2^63, found {} data", self.element.name())
            })
        };
        if !self.fortran || self.shape.len() < 2 {
            return self.data.chunks_exact(size).map(read).collect();
        }
        // Fortran order: the first index varies fastest.
        let mut strides = Vec::with_capacity(self.shape.len());
        let mut stride = size;
        for &d in &self.shape {
            strides.push(stride);
            stride *= d;
        }
        let total = self.data.len() / size;
        let mut out = Vec::with_capacity(total);
        let mut index = vec![0usize; self.shape.len()];
        for _ in 0..total {
            let at: usize = index.iter().zip(&strides).map(|(i, s)| i * s).sum();
            let bytes = self.data.get(at..at + size).ok_or("an array index is outside its data")?;
            out.push(read(bytes)?);
            for (i, &d) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < d {
                    break;
                }
                *i = 0;
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fortran_order_is_turned() {
        // [[1, 2, 3], [4, 5, 6]] column after column
        let data = vec![1, 4, 2, 5, 3, 6];
        let a = Array::new((Element::U8, false), vec![2, 3], true, data.clone()).unwrap();
        assert_eq!(a.to_i64().unwrap(), [1, 2, 3, 4, 5, 6]);
        let c = Array::new((Element::U8, false), vec![2, 3], false, data.clone()).unwrap();
        assert_eq!(c.to_i64().unwrap(), [1, 4, 2, 5, 3, 6]);
        assert!(Array::new((Element::U8, false), vec![2, 4], false, data.clone()).is_err());
        assert!(Array::new((Element::U8, false), vec![usize::MAX, 3], false, data).is_err());
    }
}
