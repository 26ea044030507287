//! Defects of our own, put in one after the other: how many seeds it takes to find each. Owns the sweep over
//! them and its table. What the defects are stands in `coracle_storage::mutant`.

use std::time::{Duration, Instant};

use coracle_storage::Mutant;

use super::cores;
use crate::sweep::{Summary, Sweep};

/// See [`Command::Mutants`](super::Command::Mutants).
#[derive(Debug, clap::Args)]
pub struct Mutants {
    /// Only this one; may be said several times
    #[arg(long, value_name = "NAME", value_parser = named)]
    pub only: Vec<Mutant>,
    /// Within so many seeds each must be found
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub seeds: u64,
    /// The first of them
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub from: u64,
    /// How long faults go on in each, in virtual seconds
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub seconds: u64,
    /// Processes at a time (default: one per core)
    #[arg(long, value_name = "N")]
    pub jobs: Option<usize>,
    /// List them, and do nothing
    #[arg(long)]
    pub list: bool,
}

/// As a value of the command line.
pub(super) fn named(name: &str) -> Result<Mutant, String> {
    let names = || Mutant::ALL.iter().map(|mutant| mutant.name()).collect::<Vec<_>>().join(", ");
    Mutant::named(name).ok_or_else(|| format!("there are {}", names()))
}

/// How one was found.
struct Found {
    seed: u64,
    by: String,
}

pub(super) fn run(asked: &Mutants) -> Result<bool, String> {
    let mutants = if asked.only.is_empty() { Mutant::ALL } else { &asked.only };
    if asked.list {
        mutants.iter().for_each(|mutant| println!("{:26}{}", mutant.name(), mutant.what()));
        return Ok(true);
    }
    if !cfg!(debug_assertions) {
        return Err("a release build has no defects to put in: build it without --release".into());
    }
    println!("{:26} {:>5} {:>6} {:>8}  found by", "defect", "seed", "seeds", "took");
    let (mut missed, mut needed) = (Vec::new(), 0);
    for mutant in mutants.iter().copied() {
        let summary = sweep(asked, asked.seeds, Some(mutant))?.run(|_| ());
        let (seeds, took) = (summary.reports.len(), told(summary.took));
        match found(&summary) {
            Some(Found { seed, by }) => {
                needed = needed.max(summary.reports.len() as u64);
                println!("{:26} {seed:>5} {seeds:>6} {took:>8}  {by}", mutant.name());
            }
            None => {
                println!("{:26} {:>5} {seeds:>6} {took:>8}  NOT FOUND", mutant.name(), "-");
                missed.push(mutant.name());
            }
        }
    }
    let began = Instant::now();
    let sound = sweep(asked, needed, None)?.run(|_| ());
    let failed = sound.failed();
    let took = told(began.elapsed());
    println!("without any: {needed} seeds, {} failed, {took}", failed.len());
    for seed in &failed {
        println!("  again: coracle-jepsen sim --seed {seed} --seconds {} --trace", asked.seconds);
    }
    match missed.is_empty() {
        true => println!("each of {} was found", mutants.len()),
        false => println!("not found: {}", missed.join(", ")),
    }
    Ok(missed.is_empty() && failed.is_empty())
}

fn sweep(asked: &Mutants, seeds: u64, mutant: Option<Mutant>) -> Result<Sweep, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let mut args = vec!["--seconds".to_owned(), asked.seconds.to_string()];
    args.extend(mutant.iter().flat_map(|it| ["--mutant".to_owned(), it.name().to_owned()]));
    let (from, jobs) = (asked.from, asked.jobs.unwrap_or_else(cores));
    Ok(Sweep { program, from, seeds, jobs, until_failure: mutant.is_some(), args })
}

/// The first seed that found it, and the sentence that did not hold.
fn found(summary: &Summary) -> Option<Found> {
    let report = summary.reports.values().find(|report| !report.violations.is_empty())?;
    let first = report.violations[0].lines().next().unwrap_or_default();
    Some(Found { seed: report.seed, by: first.chars().take(90).collect() })
}

fn told(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}
