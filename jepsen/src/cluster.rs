//! Clusters to do harm to. Owns nothing itself: simulated ones are in `sim`, real ones in `process`,
//! what stands between those and their clients in `proxy`.

pub mod process;
pub mod proxy;
pub mod sim;
