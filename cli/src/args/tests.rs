//! What the command line accepts and refuses.

use super::*;

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn help_lists_every_command_once() {
    let mut listed: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| *names).copied().collect();
    let mut built = Cli::command();
    built.build();
    let mut commands: Vec<String> =
        built.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    listed.sort_unstable();
    commands.sort();
    assert_eq!(listed, commands);
}

#[test]
fn durations_need_a_unit() {
    assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
    assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
    for wrong in ["", "5", "s", "-1s", "1.5s", "5 s", "18446744073709551615d", "1w"] {
        assert!(parse_duration(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn nodes_shards_and_rules() {
    assert_eq!(parse_node("n3"), Ok(NodeId(3)));
    assert_eq!(parse_node("3"), Ok(NodeId(3)));
    assert!(parse_node("n0").is_err() && parse_node("nx").is_err());
    assert_eq!(parse_shard("0"), Ok(ShardId(0)));
    assert!(parse_shard("n1").is_err());
    assert_eq!(parse_entity("delimiter:/"), Ok(EntityRule::Delimiter(b'/')));
    assert_eq!(parse_entity("delimiter::"), Ok(EntityRule::Delimiter(b':')));
    assert_eq!(parse_entity("delimiter:0x00"), Ok(EntityRule::Delimiter(0)));
    assert_eq!(parse_entity("prefix:8"), Ok(EntityRule::Prefix(8)));
    assert!(parse_entity("delimiter:").is_err() && parse_entity("first").is_err());
}
