//! Simulated clusters: seeds on which all must hold, a fault that must be found, and proof that a seed
//! is a whole run. Each run is a process of its own, as in the command.

use std::process::{Command, Output};

/// `CORACLE_SIM_SEEDS` sets how many.
const SEEDS_DEFAULT: &str = "50";

fn sim(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coracle-jepsen"));
    command.arg("sim").args(args).output().expect("the harness starts")
}

fn text(output: &Output) -> String {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{err}")
}

#[test]
fn all_holds_on_fifty_seeds() {
    let seeds = std::env::var("CORACLE_SIM_SEEDS").unwrap_or_else(|_| SEEDS_DEFAULT.to_owned());
    let output = sim(&["--seeds", &seeds, "--nodes", "3"]);
    println!("{}", text(&output));
    assert!(output.status.success(), "{}", text(&output));
    // Seeds that do nothing would pass without saying anything.
    let summary = text(&output);
    for happened in ["crash of", "crash point", "isolated", "clock jump", "disk stall", "reset"] {
        assert!(summary.contains(happened), "no seed came to {happened:?}:\n{summary}");
    }
}

#[test]
fn two_processes_with_one_seed_leave_one_trace() {
    for seed in ["3", "8"] {
        let args = ["--seed", seed, "--seconds", "10", "--trace"];
        let (one, other) = (text(&sim(&args)), text(&sim(&args)));
        let parted = one.lines().zip(other.lines()).find(|(one, other)| one != other);
        assert_eq!(parted, None, "seed {seed}: the first line that differs");
        assert_eq!(one, other, "seed {seed}: one has more lines");
        assert!(one.lines().count() > 100, "seed {seed} did something:\n{one}");
    }
}

#[test]
fn disks_that_lie_about_syncs_are_found() {
    let output = sim(&["--seeds", "12", "--nodes", "3", "--lying-disks"]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("again: coracle-jepsen sim --seed"), "how to see it again:\n{text}");
}
