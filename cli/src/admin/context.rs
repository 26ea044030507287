//! `coracle context`: clusters by name. The file is `crate::context`'s.

use serde::Serialize;

use crate::args::{Context, Global};
use crate::context::{Contexts, Entry, Environment, resolve};
use crate::failure::Failure;
use crate::output::{Column, Output};

#[derive(Serialize)]
struct ContextView {
    name: String,
    current: bool,
    endpoints: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    keyspace: Option<String>,
}

#[derive(Serialize)]
struct ShownView {
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<String>,
    endpoints: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    keyspace: Option<String>,
    origin: String,
}

const COLUMNS: &[Column<ContextView>] = &[
    Column::text("CURRENT", |context| if context.current { "*" } else { "" }.to_owned()),
    Column::text("NAME", |context| context.name.clone()),
    Column::text("NODES", |context| context.endpoints.join(",")),
    Column::text("KEYSPACE", |context| {
        context.keyspace.clone().unwrap_or_else(|| "default".to_owned())
    }),
];

/// Runs it.
pub fn run(command: Context, global: &Global, output: &Output) -> Result<(), Failure> {
    let environment = Environment::read();
    let path = environment.path()?;
    let mut contexts = Contexts::load(&path)?;
    match command {
        Context::Ls => {
            let views: Vec<ContextView> = views(contexts);
            output.list("ContextList", COLUMNS, &views)
        }
        Context::Show => {
            let target = resolve(global, &environment)?;
            let text = target.describe();
            let origin = target.origin.clone();
            let view = ShownView {
                context: target.context,
                endpoints: target.endpoints,
                keyspace: target.keyspace,
                origin: target.origin,
            };
            output.item("Context", &view, || format!("{text}, because of: {origin}"))
        }
        Context::Use { name } => {
            let name = match name.as_str() {
                "-" => contexts.previous.clone().ok_or_else(|| {
                    Failure::usage("there is no context before this one").next("coracle context ls")
                })?,
                _ => name,
            };
            known(&contexts, &name)?;
            contexts.choose(&name);
            contexts.save(&path)?;
            output.line(&format!("commands mean {name} now"))
        }
        Context::Add { name, nodes, keyspace } => {
            contexts.contexts.insert(name.clone(), Entry { endpoints: nodes, keyspace });
            let is_first = contexts.current.is_none();
            if is_first {
                contexts.choose(&name);
            }
            contexts.save(&path)?;
            output.line(&match is_first {
                true => format!("{name} added; commands mean it now"),
                false => format!("{name} added. Next: coracle context use {name}"),
            })
        }
        Context::Rm { name } => {
            known(&contexts, &name)?;
            contexts.remove(&name);
            contexts.save(&path)?;
            output.line(&format!("{name} removed"))
        }
    }
}

fn known(contexts: &Contexts, name: &str) -> Result<(), Failure> {
    match contexts.contexts.contains_key(name) {
        true => Ok(()),
        false => {
            Err(Failure::usage(format!("there is no context {name:?}")).next("coracle context ls"))
        }
    }
}

fn views(contexts: Contexts) -> Vec<ContextView> {
    let Contexts { current, contexts, .. } = contexts;
    let view = |(name, entry): (String, Entry)| ContextView {
        current: current.as_deref() == Some(&name),
        name,
        endpoints: entry.endpoints,
        keyspace: entry.keyspace,
    };
    contexts.into_iter().map(view).collect()
}
