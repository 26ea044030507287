//! The fault harness's own tests: checkers that are shown bad histories, the simulated
//! network, and simulated clusters.

mod network;
mod simulation;
mod witness;
