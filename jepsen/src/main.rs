//! The program `coracle-jepsen`: parses, runs, exits. What the commands do stands in `command`.

mod entropy;

use std::process::ExitCode;

use clap::Parser;
use coracle_jepsen::command::{Args, run};

fn main() -> ExitCode {
    let args = Args::parse();
    let Some(seed) = args.seed() else { return run(args) };
    entropy::seed(seed);
    // A thread of its own: this one has taken hash seeds already.
    let simulation = std::thread::Builder::new().name("simulation".to_owned()).spawn(|| run(args));
    let ended = simulation.map(std::thread::JoinHandle::join);
    match ended {
        Ok(Ok(code)) => code,
        // Whoever panicked has said so.
        Ok(Err(_)) => ExitCode::from(1),
        Err(error) => {
            eprintln!("coracle-jepsen: the system refuses a thread: {error}");
            ExitCode::from(2)
        }
    }
}
