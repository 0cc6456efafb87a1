//! The report: one self-contained HTML page from one data file. It renders and computes nothing.
//!
//! A command fills a [`ReportData`] (every field says its shape and unit) and [renders](render()) it. The page shows the data
//! as they are; the only arithmetic there is formatting (rounding, percentages of two figures that are both shown, rows
//! times the bytes of a row).

mod check;
mod data;
mod render;

pub use data::{
    CoActivationMap, ExpertOrder, FORMAT, FrontierPoint, Measures, Method, Part, Prediction, Profile,
    PruningBudget, PruningRow, ReportData, Setting, SubgraphCurve, Training, TrainingPoint,
};
pub use render::render;
