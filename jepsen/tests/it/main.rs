//! The fault harness's own tests: checkers that are shown bad histories, and simulated clusters.

mod simulation;
mod witness;
mod search;
