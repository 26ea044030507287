//! Owns clusters by name (`contexts.toml`), which cluster a command means and why, and the client
//! for it. Does not print (see `admin::context`).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_client::Client;
use serde::{Deserialize, Serialize};

use crate::args::Global;
use crate::failure::{Exit, Failure};

/// Where a server listens that was given no address.
const ENDPOINT_DEFAULT: &str = "127.0.0.1:7400";

/// How long a call may take when the command line says nothing: twenty failovers long.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// How long a command waits for the first node to answer, at most: a cluster that has just lost a
/// node answers at once from another, and a person has better things to do than to wait for none.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The file of clusters.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// The one that commands mean when nothing else is said.
    pub current: Option<String>,
    /// The one before it: `coracle context use -`.
    pub previous: Option<String>,
    /// All of them.
    #[serde(default)]
    pub contexts: BTreeMap<String, Entry>,
}

/// One cluster.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Some of its nodes, host:port.
    pub endpoints: Vec<String>,
    /// The keyspace that commands mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keyspace: Option<String>,
}

/// The cluster that a command means.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    /// Nodes to begin with.
    pub endpoints: Vec<String>,
    /// The keyspace, where the context names one.
    pub keyspace: Option<String>,
    /// The context, where it is one.
    pub context: Option<String>,
    /// What decided, for people.
    pub origin: String,
}

/// What the environment says about clusters.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `CORACLE_ENDPOINTS`.
    pub endpoints: Option<String>,
    /// `CORACLE_CONTEXT`.
    pub context: Option<String>,
    /// `XDG_CONFIG_HOME`.
    pub config_home: Option<OsString>,
    /// `HOME`.
    pub home: Option<OsString>,
}

impl Environment {
    /// Of this process. Empty variables count as unset.
    pub fn read() -> Environment {
        let os = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let text = |name: &str| os(name).and_then(|value| value.into_string().ok());
        Environment {
            endpoints: text("CORACLE_ENDPOINTS"),
            context: text("CORACLE_CONTEXT"),
            config_home: os("XDG_CONFIG_HOME"),
            home: os("HOME"),
        }
    }

    /// Where the file of clusters is.
    pub fn path(&self) -> Result<PathBuf, Failure> {
        let base = match (&self.config_home, &self.home) {
            (Some(config), _) => PathBuf::from(config),
            (None, Some(home)) => Path::new(home).join(".config"),
            (None, None) => {
                return Err(Failure::failed("no place for contexts: HOME is not set")
                    .next("set HOME or XDG_CONFIG_HOME, or name nodes with --endpoints"));
            }
        };
        Ok(base.join("coracle").join("contexts.toml"))
    }
}

impl Contexts {
    /// Reads the file; none is the same as an empty one.
    pub fn load(path: &Path) -> Result<Contexts, Failure> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Contexts::default());
            }
            Err(error) => return Err(Failure::io("read", path, &error)),
        };
        toml::from_str(&text).map_err(|error| {
            Failure::failed(format!("{} cannot be read: {error}", path.display()))
                .next("correct the file, or remove it and add the clusters again")
        })
    }

    /// Replaces the file at once: readers see the old one or the new one. Only for this user's eyes:
    /// tokens will stand in it.
    pub fn save(&self, path: &Path) -> Result<(), Failure> {
        let text = toml::to_string(self).map_err(|error| {
            Failure::failed(format!("cannot write {}: {error}", path.display()))
        })?;
        let written = || -> std::io::Result<()> {
            let dir = path.parent().unwrap_or(Path::new("."));
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            let beside = path.with_extension(format!("toml.{}", std::process::id()));
            let mut options = OpenOptions::new();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(text.as_bytes())?;
            fs::rename(&beside, path)
        };
        written().map_err(|error| Failure::io("write", path, &error))
    }

    /// Makes this one current, and the current one previous.
    pub fn choose(&mut self, name: &str) {
        if self.current.as_deref() != Some(name) {
            self.previous = self.current.replace(name.to_owned());
        }
    }

    /// Takes one out. When it was current, the one before it is again.
    pub fn remove(&mut self, name: &str) -> Option<Entry> {
        let entry = self.contexts.remove(name)?;
        if self.previous.as_deref() == Some(name) {
            self.previous = None;
        }
        if self.current.as_deref() == Some(name) {
            self.current = self.previous.take();
        }
        Some(entry)
    }
}

/// Which cluster is meant: flag, environment, current context, this machine; the first that says
/// anything.
pub fn resolve(global: &Global, env: &Environment) -> Result<Target, Failure> {
    let plain = |endpoints: Vec<String>, origin: &str| Target {
        endpoints,
        keyspace: None,
        context: None,
        origin: origin.to_owned(),
    };
    if !global.endpoints.is_empty() {
        return Ok(plain(global.endpoints.clone(), "--endpoints"));
    }
    if let Some(name) = &global.context {
        return named(name, "--context", &Contexts::load(&env.path()?)?);
    }
    if let Some(endpoints) = &env.endpoints {
        let endpoints = endpoints.split(',').map(|text| text.trim().to_owned()).collect();
        return Ok(plain(endpoints, "CORACLE_ENDPOINTS"));
    }
    if let Some(name) = &env.context {
        return named(name, "CORACLE_CONTEXT", &Contexts::load(&env.path()?)?);
    }
    // Without a home directory there simply are no contexts.
    if let Ok(path) = env.path() {
        let contexts = Contexts::load(&path)?;
        if let Some(name) = &contexts.current {
            return named(name, "current context", &contexts);
        }
    }
    Ok(plain(vec![ENDPOINT_DEFAULT.to_owned()], "default"))
}

fn named(name: &str, origin: &str, contexts: &Contexts) -> Result<Target, Failure> {
    let entry = contexts.contexts.get(name).ok_or_else(|| {
        Failure::usage(format!("there is no context {name:?} ({origin})"))
            .next("coracle context ls shows them, coracle context add NAME HOST:PORT makes one")
    })?;
    Ok(Target {
        endpoints: entry.endpoints.clone(),
        keyspace: entry.keyspace.clone(),
        context: Some(name.to_owned()),
        origin: origin.to_owned(),
    })
}

impl Target {
    /// For messages: which nodes, and why these.
    pub fn describe(&self) -> String {
        let nodes = self.endpoints.join(", ");
        match &self.context {
            Some(context) => format!("{nodes} (context {context})"),
            None => format!("{nodes} ({})", self.origin),
        }
    }

    /// A client that connects when it is first used: for a cluster that may not stand yet.
    pub fn client_lazy(&self, global: &Global) -> Result<Client, Failure> {
        let builder = Client::builder()
            .seeds(self.endpoints.iter().cloned())
            .name(concat!("coracle-cli/", env!("CARGO_PKG_VERSION")))
            .operation_timeout(global.timeout.unwrap_or(TIMEOUT_DEFAULT));
        builder.connect_lazy().map_err(|error| {
            Failure::usage(error.to_string()).next(format!("nodes: {}", self.describe()))
        })
    }

    /// A client of a cluster that stands: fails soon when no node answers.
    pub async fn client(&self, global: &Global) -> Result<Client, Failure> {
        let timeout = global.timeout.unwrap_or(TIMEOUT_DEFAULT);
        let probe = Client::builder()
            .seeds(self.endpoints.iter().cloned())
            .operation_timeout(timeout.min(CONNECT_TIMEOUT));
        // The timeout of a client holds for all that it does, so the one that waits for the cluster
        // is another than the one that works with it.
        probe.connect().await.map_err(|error| self.unreachable(&error))?;
        self.client_lazy(global)
    }

    fn unreachable(&self, error: &coracle_client::Error) -> Failure {
        let mut failure = Failure::call("reach the cluster", error);
        if failure.exit == Exit::Unreachable {
            failure.next = Some(match &self.context {
                Some(name) => format!(
                    "is it running? coracle context show says why {name} is meant; --endpoints names others"
                ),
                None => "start one with coracle demo, or name a node with --endpoints".to_owned(),
            });
        }
        failure
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn entry(endpoint: &str) -> Entry {
        Entry { endpoints: vec![endpoint.to_owned()], keyspace: None }
    }

    fn environment(home: &Path) -> Environment {
        Environment { home: Some(home.as_os_str().to_owned()), ..Environment::default() }
    }

    #[test]
    fn the_file_comes_back_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = environment(dir.path()).path().unwrap();
        assert_eq!(Contexts::load(&path).unwrap(), Contexts::default());
        let mut contexts = Contexts::default();
        contexts.contexts.insert("a".to_owned(), entry("a:1"));
        contexts.choose("a");
        contexts.save(&path).unwrap();
        assert_eq!(Contexts::load(&path).unwrap(), contexts);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        fs::write(&path, "currant = \"a\"").unwrap();
        let failure = Contexts::load(&path).unwrap_err();
        assert!(failure.what.contains("currant"), "{failure:?}");
    }

    #[test]
    fn the_one_before_comes_back_when_one_goes() {
        let mut contexts = Contexts::default();
        for name in ["a", "b"] {
            contexts.contexts.insert(name.to_owned(), entry("x:1"));
            contexts.choose(name);
        }
        contexts.choose("b");
        assert_eq!(contexts.previous.as_deref(), Some("a"));
        contexts.remove("b").unwrap();
        assert_eq!((contexts.current.as_deref(), contexts.previous.as_deref()), (Some("a"), None));
        assert!(contexts.remove("b").is_none());
    }

    #[test]
    fn what_was_said_nearest_decides() {
        let dir = tempfile::tempdir().unwrap();
        let mut env = environment(dir.path());
        let mut global = Global::default();
        let endpoint = |global: &Global, env: &Environment| resolve(global, env).unwrap().endpoints;
        assert_eq!(endpoint(&global, &env), [ENDPOINT_DEFAULT]);

        let mut contexts = Contexts::default();
        contexts.contexts.insert("file".to_owned(), entry("file:1"));
        contexts.contexts.insert("env".to_owned(), entry("env:1"));
        contexts.contexts.insert("flag".to_owned(), entry("flag:1"));
        contexts.choose("file");
        contexts.save(&env.path().unwrap()).unwrap();
        assert_eq!(endpoint(&global, &env), ["file:1"]);
        env.context = Some("env".to_owned());
        assert_eq!(endpoint(&global, &env), ["env:1"]);
        env.endpoints = Some("e1:1, e2:1".to_owned());
        assert_eq!(endpoint(&global, &env), ["e1:1", "e2:1"]);
        global.context = Some("flag".to_owned());
        assert_eq!(endpoint(&global, &env), ["flag:1"]);
        global.endpoints = vec!["given:1".to_owned()];
        assert_eq!(endpoint(&global, &env), ["given:1"]);

        global.endpoints.clear();
        global.context = Some("gone".to_owned());
        assert_eq!(resolve(&global, &env).unwrap_err().exit, Exit::Usage);
    }
}
