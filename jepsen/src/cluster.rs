//! Clusters to do harm to. Owns nothing itself: simulated ones are in `sim`, real ones in `process`.

pub mod process;
pub mod sim;
