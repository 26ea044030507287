//! Clusters to do harm to. Owns nothing itself: simulated ones are in `sim`, real ones in `process`.
//! What is done to those without touching them: `relay` makes one hear late, `quota` holds them to a
//! share of a core, `proxy` stands between them and their clients.

mod relay;
pub mod process;
pub mod proxy;
pub mod quota;
pub mod sim;
