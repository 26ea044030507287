//! `coracle config`: a server's settings, looked at without a server.

use coracle_server::config::Config as ServerConfig;

use crate::args::Config;
use crate::failure::Failure;
use crate::output::Output;
use crate::server::load;

/// Runs it.
pub fn run(command: Config, output: &Output) -> Result<(), Failure> {
    match command {
        Config::Check { file, settings } => {
            if file.is_some() && settings.config.is_some() && file != settings.config {
                return Err(Failure::usage(
                    "name one file, not one as FILE and another as --config",
                ));
            }
            load(&settings, file.as_deref())?;
            output.line("the settings are sound")
        }
        Config::Show { origin, diff_default, settings } => {
            let config = load(&settings, None)?;
            output.data(config.show(origin, diff_default).as_bytes())
        }
        Config::Explain { key } => match ServerConfig::explain(&key) {
            Ok(text) => output.data(text.as_bytes()),
            Err(problem) => Err(Failure::usage(problem.to_string())),
        },
        Config::Init => output.data(ServerConfig::sample().as_bytes()),
    }
}
