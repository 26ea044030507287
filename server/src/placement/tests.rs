//! Plans: against the checker on random clusters, against exhaustive search on small ones, and what an
//! operator would see.
//!
//! Every random cluster has a seed; a failure names it. `CORACLE_SEED=17` runs only that one.

mod examples;
mod exhaustive;
mod mutants;
mod random;
mod worlds;

use super::check::check;
use super::*;
