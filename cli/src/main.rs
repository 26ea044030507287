//! The program: parses the command line, dispatches, and ends with the exit code. Owns the runtime.

use std::process::ExitCode;
use std::time::Duration;

use clap::FromArgMatches;
use coracle_cli::admin;
use coracle_cli::args::{Cli, Command, command};
use coracle_cli::failure::{Exit, Failure};
use coracle_cli::output::Output;
use coracle_cli::{data, delete_range, demo, export, import, server};

/// What is still under way when a command has ended is not worth more: reads of a terminal never
/// end, and everything that matters was waited for.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let parsed = command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            Output::usage(&error);
            // 0 for help and version, 2 for what was not understood.
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let output = Output::new(&cli.global);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output.failure(&Failure::failed(format!("cannot start: {error}")));
            return code(Exit::Failed);
        }
    };
    let result = runtime.block_on(dispatch(cli, &output));
    let result = result.and_then(|()| output.flush());
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    match result {
        Ok(()) => code(Exit::Done),
        Err(failure) => {
            // What was printed before it stands before it. Where that fails, this is all there is.
            let _ = output.flush();
            output.failure(&failure);
            code(failure.exit)
        }
    }
}

fn code(exit: Exit) -> ExitCode {
    ExitCode::from(exit as u8)
}

async fn dispatch(cli: Cli, output: &Output) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Put(put) => interruptible(data::put(put, &global, output)).await,
        Command::Get(get) => interruptible(data::get(get, &global, output)).await,
        Command::Delete(delete) => interruptible(data::delete(delete, &global, output)).await,
        Command::DeleteRange(delete) => {
            interruptible(delete_range::run(delete, &global, output)).await
        }
        Command::Scan(scan) => interruptible(data::scan(scan, &global, output)).await,
        Command::Import(import) => interruptible(import::run(import, &global, output)).await,
        Command::Export(export) => interruptible(export::run(export, &global, output)).await,
        Command::Init(init) => interruptible(admin::cluster::init(init, &global, output)).await,
        Command::Status => interruptible(admin::cluster::status(&global, output)).await,
        Command::Node(node) => interruptible(admin::node::run(node, &global, output)).await,
        Command::Shard(shard) => interruptible(admin::shard::run(shard, &global, output)).await,
        Command::Replica(replica) => {
            interruptible(admin::replica::run(replica, &global, output)).await
        }
        Command::Rebalance(rebalance) => {
            interruptible(admin::rebalance::run(rebalance, &global, output)).await
        }
        Command::Operation(operation) => {
            interruptible(admin::operation::run(operation, &global, output)).await
        }
        Command::Keyspace(keyspace) => {
            interruptible(admin::keyspace::run(keyspace, &global, output)).await
        }
        Command::Config(config) => admin::config::run(config, output),
        Command::Context(context) => admin::context::run(context, &global, output),
        Command::Completion { shell } => admin::pages::completion(shell, output),
        Command::Man { dir } => admin::pages::man(dir.as_deref(), output),
        // These two end by signals in their own way.
        Command::Server(server) => server::run(server, output).await,
        Command::Demo(demo) => demo::run(demo, output).await,
    }
}

/// Ctrl-C ends the command. A write that was under way may or may not have been applied. A command that
/// has words of its own for that comes first.
async fn interruptible(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::select! {
        biased;
        result = command => result,
        _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Interrupted, "interrupted")),
    }
}
