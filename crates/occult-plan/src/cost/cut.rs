//! Parts of a rank's tokens.

use std::fmt;
use std::ops::Range;

/// How a rank's tokens are cut into consecutive parts. Nothing can be computed before the first part is there, and nothing is
/// left to compute when the last one goes back: smaller ones at the ends expose less wire, where compute hides the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// At least 1.
    parts: usize,
    /// How many times as large as the first and the last part each part between them is, at least 1.
    inner: usize,
}

impl Cut {
    /// All tokens at once.
    pub const WHOLE: Self = Self { parts: 1, inner: 1 };

    /// Parts whose sizes differ by at most one token.
    pub fn even(parts: usize) -> Self {
        Self { parts: parts.max(1), inner: 1 }
    }

    /// The same parts with inner ones so many times as large as those at the ends; fewer than three have none.
    pub fn with_inner(self, inner: usize) -> Self {
        Self { inner: if self.parts < 3 { 1 } else { inner.max(1) }, ..self }
    }

    /// Number of parts.
    pub fn parts(self) -> usize {
        self.parts
    }

    /// See [`with_inner`](Self::with_inner).
    pub fn inner(self) -> usize {
        self.inner
    }

    /// Tokens of each part, in order. Parts of one size differ by at most one token.
    pub fn ranges(self, tokens: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
        let all = self.units(self.parts);
        (0..self.parts).map(move |i| self.units(i) * tokens / all..self.units(i + 1) * tokens / all)
    }

    /// Size of the first `i` parts, the part at either end being 1.
    fn units(self, i: usize) -> usize {
        match self.parts {
            0..3 => i,
            parts => i.min(1) + i.saturating_sub(1).min(parts - 2) * self.inner + usize::from(i == parts),
        }
    }

    /// Share of the tokens of each part.
    pub(super) fn shares(self) -> impl ExactSizeIterator<Item = f64> {
        let all = self.units(self.parts) as f64;
        (0..self.parts).map(move |i| (self.units(i + 1) - self.units(i)) as f64 / all)
    }
}

/// `3`, or `3 (inner x2)`.
impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.inner {
            1 => write!(f, "{}", self.parts),
            inner => write!(f, "{} (inner x{inner})", self.parts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_the_tokens() {
        for (tokens, parts, inner) in [(0, 3, 1), (1, 4, 2), (10, 3, 1), (7, 7, 3), (100, 5, 3), (9, 2, 3)] {
            let cut = Cut::even(parts).with_inner(inner);
            let ranges: Vec<_> = cut.ranges(tokens).collect();
            assert_eq!(ranges.len(), parts);
            assert_eq!(ranges.iter().cloned().flatten().collect::<Vec<_>>(), (0..tokens).collect::<Vec<_>>());
            assert!((cut.shares().sum::<f64>() - 1.0).abs() < 1e-9);
            for (range, share) in ranges.iter().zip(cut.shares()) {
                assert!((range.len() as f64 - share * tokens as f64).abs() < 1.0, "{ranges:?}");
            }
        }
        let sizes = |cut: Cut| cut.ranges(80).map(|r| r.len()).collect::<Vec<_>>();
        assert_eq!(sizes(Cut::even(4).with_inner(3)), [10, 30, 30, 10]);
        assert_eq!(Cut::even(2).with_inner(3), Cut::even(2));
    }
}
