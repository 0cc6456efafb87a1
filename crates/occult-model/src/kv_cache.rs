//! Keys and values of the positions that were already computed.

use candle_core::{DType, Device, Tensor};

use crate::error::{ModelError, Result};

/// Fewest positions that room is made for.
const FIRST: usize = 64;

/// One layer: one or two tensors `[B, h, S, d]` that grow along `S` (keys and values, or latents with rotary keys).
///
/// Room doubles when it is used up, so a position is copied once or twice in all. Views that [`append`](Self::append)
/// gave out show the same memory: they stay valid because positions are only added behind them.
#[derive(Debug, Default)]
pub(crate) struct LayerCache {
    rooms: Vec<Tensor>,
    len: usize,
}

impl LayerCache {
    /// Appends `[B, h, T, d]` each, always as many, and returns views of everything so far.
    pub(crate) fn append<const N: usize>(&mut self, new: [&Tensor; N]) -> Result<[Tensor; N]> {
        let rooms = std::mem::take(&mut self.rooms);
        if !rooms.is_empty() && rooms.len() != N {
            return Err(ModelError::request("a cache of another kind of attention"));
        }
        let mut so_far = new.map(Clone::clone);
        let mut len = self.len;
        for (i, new) in new.into_iter().enumerate() {
            let room = match rooms.get(i) {
                Some(room) => self.make_room(room, new)?,
                None => new_room(new, new.dim(2)?)?,
            };
            len = self.len + new.dim(2)?;
            room.slice_set(&new.contiguous()?, 2, self.len)?;
            so_far[i] = room.narrow(2, 0, len)?;
            self.rooms.push(room);
        }
        self.len = len;
        Ok(so_far)
    }

    /// `room`, or a larger one with the same positions, that also holds those of `new`.
    fn make_room(&self, room: &Tensor, new: &Tensor) -> Result<Tensor> {
        let (b, h, capacity, d) = room.dims4()?;
        let (new_b, new_h, t, new_d) = new.dims4()?;
        if (b, h, d) != (new_b, new_h, new_d) {
            return Err(ModelError::request(format!(
                "a cache of {b} sequences, {h} heads of {d} is given {new_b}, {new_h} of {new_d}"
            )));
        }
        if self.len + t <= capacity {
            return Ok(room.clone());
        }
        let larger = new_room(new, self.len + t)?;
        larger.slice_set(&room.narrow(2, 0, self.len)?.contiguous()?, 2, 0)?;
        Ok(larger)
    }
}

impl Clone for LayerCache {
    /// The copy has its own memory: both can go on differently.
    fn clone(&self) -> Self {
        let copy = |t: &Tensor| t.copy().unwrap_or_else(|_| t.clone());
        Self { rooms: self.rooms.iter().map(copy).collect(), len: self.len }
    }
}

/// Room like `like` `[B, h, _, d]` for at least `len` positions.
fn new_room(like: &Tensor, len: usize) -> Result<Tensor> {
    let (b, h, _, d) = like.dims4()?;
    // One more, so that the first token after a prompt of a round length has room.
    let capacity = (len + 1).next_power_of_two().max(FIRST);
    Ok(Tensor::zeros((b, h, capacity, d), DType::F32, &Device::Cpu)?)
}

/// The cache of a batch of sequences, filled by [`Decoder::forward`](crate::Decoder::forward). A clone is a copy.
#[derive(Debug, Clone)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    /// Positions so far, padding included.
    pub(crate) len: usize,
    /// Padding positions at the start of each sequence; set by the first batch.
    pub(crate) padding: Vec<usize>,
}

impl KvCache {
    /// An empty cache for a model with this many layers.
    pub(crate) fn new(num_layers: usize) -> Self {
        Self { layers: (0..num_layers).map(|_| LayerCache::default()).collect(), len: 0, padding: Vec::new() }
    }

    /// Positions so far, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first batch.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(from: usize, t: usize) -> Tensor {
        let values: Vec<f32> = (0..2 * 3 * t * 4).map(|i| (from * 1000 + i) as f32).collect();
        Tensor::from_vec(values, (2, 3, t, 4), &Device::Cpu).expect("shape")
    }

    #[test]
    fn pieces_follow_each_other_and_clones_go_their_own_way() -> Result<()> {
        let mut cache = LayerCache::default();
        let pieces: Vec<Tensor> =
            [50, 1, 30, 1, 200].into_iter().enumerate().map(|(i, t)| rows(i, t)).collect();
        for i in 0..pieces.len() {
            let mut other = cache.clone();
            let [k, v] = cache.append([&pieces[i], &pieces[i]])?;
            let want = Tensor::cat(&pieces[..=i], 2)?;
            for got in [&k, &v] {
                assert_eq!((got - &want)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
            }
            other.append([&rows(77, 3), &rows(77, 3)])?;
            assert_eq!((k - &want)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
        }
        assert!(cache.append([&rows(0, 1).narrow(0, 0, 1)?, &rows(0, 1)]).is_err());
        Ok(())
    }
}
