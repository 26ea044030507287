//! `coracle keyspace`.

use coracle_client::EntityRule;
use coracle_client::admin::NewKeyspace;
use coracle_client::topology::KeyspaceInfo;
use serde::Serialize;

use crate::args::{Global, Keyspace};
use crate::encoding::escape;
use crate::failure::Failure;
use crate::output::{Column, Output};

use super::client;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyspaceView {
    id: u32,
    name: String,
    entity: String,
    history_ms: u64,
}

const COLUMNS: &[Column<KeyspaceView>] = &[
    Column::text("NAME", |keyspace| keyspace.name.clone()),
    Column::text("ENTITY", |keyspace| keyspace.entity.clone()),
    Column::number("HISTORY", |keyspace| history(keyspace.history_ms)),
    Column::number("ID", |keyspace: &KeyspaceView| keyspace.id.to_string()).wide(),
];

/// Runs it.
pub async fn run(command: Keyspace, global: &Global, output: &Output) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    let admin = client.admin();
    match command {
        Keyspace::Set { name, history, dry_run } => {
            let what = format!("change keyspace {name:?}");
            let changed = admin.set_history(&name, history, dry_run).await;
            let view = view(changed.map_err(|error| Failure::call(what, &error))?);
            output.item("Keyspace", &view, || {
                let history = self::history(view.history_ms);
                let verb = if dry_run { "could keep" } else { "keeps" };
                format!("keyspace {} {verb} a history of {history}", view.name)
            })
        }
        Keyspace::Ls => {
            let keyspaces = admin.keyspaces().await;
            let keyspaces =
                keyspaces.map_err(|error| Failure::call("list the keyspaces", &error))?;
            let views: Vec<KeyspaceView> = keyspaces.into_iter().map(view).collect();
            output.list("KeyspaceList", COLUMNS, &views)
        }
        Keyspace::Create { name, entity, history, dry_run } => {
            let new = NewKeyspace { name, entity_rule: entity, history, validate_only: dry_run };
            let what = format!("make keyspace {:?}", new.name);
            let made = admin.create_keyspace(new).await;
            let view = view(made.map_err(|error| Failure::call(what, &error))?);
            output.item("Keyspace", &view, || match dry_run {
                true => format!("keyspace {} can be made", view.name),
                false => {
                    let KeyspaceView { name, entity, .. } = &view;
                    format!(
                        "keyspace {name} made (entity {entity}). Next: coracle put K V -k {name}"
                    )
                }
            })
        }
    }
}

fn view(keyspace: KeyspaceInfo) -> KeyspaceView {
    KeyspaceView {
        id: keyspace.id,
        name: keyspace.name,
        entity: match keyspace.entity_rule {
            EntityRule::Whole => "whole".to_owned(),
            EntityRule::Delimiter(byte) => format!("delimiter:{}", escape(&[byte])),
            EntityRule::Prefix(bytes) => format!("prefix:{bytes}"),
        },
        history_ms: keyspace.history.as_millis() as u64,
    }
}

/// A history exactly, as it may be written again: `90s`, `2h`.
fn history(ms: u64) -> String {
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms")];
    let fits = units.into_iter().find(|(unit_ms, _)| ms > 0 && ms.is_multiple_of(*unit_ms));
    fits.map_or_else(|| "0s".to_owned(), |(unit_ms, unit)| format!("{}{unit}", ms / unit_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::parse_duration;

    #[test]
    fn history_is_written_as_it_is_read() {
        for text in ["0s", "1ms", "90s", "2m", "61m", "2h", "25h", "7d"] {
            let ms = parse_duration(text).expect("a duration").as_millis() as u64;
            assert_eq!(history(ms), text);
        }
    }
}
