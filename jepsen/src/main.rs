//! The program `coracle-jepsen`: parses, runs, exits. What the commands do stands in `command`.

use std::process::ExitCode;

use clap::Parser;
use coracle_jepsen::command::Args;

fn main() -> ExitCode {
    coracle_jepsen::command::run(Args::parse())
}
