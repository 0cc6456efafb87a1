//! The parts of a decoder layer, on CPU: f32 activations, weights as they are stored, or as variables in training.

mod attention;
mod latent;
mod linear;
mod mlp;
mod norm;
mod parameter;
mod rope;
mod stored;
mod view;

pub(crate) use attention::GroupedAttention;
pub(crate) use latent::{LatentAttention, Queries};
pub use linear::Linear;
pub use mlp::Mlp;
pub(crate) use norm::RmsNorm;
pub(crate) use parameter::MatrixParameter;
pub(crate) use rope::{Rope, Rotation};
pub(crate) use stored::with_f32;
pub(crate) use view::View;
