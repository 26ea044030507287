//! Names the rooms of the contract, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    reason = "generated; what is missing stands in the .proto files"
)]
pub mod v1 {
    //! What the public services say: `proto/coracle/v1`, generated.
    include!("generated/coracle.v1.rs");
}

#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    reason = "generated; what is missing stands in the .proto files"
)]
pub mod peer {
    //! What nodes say to each other: `proto/coracle/peer/v1`, generated. Not gRPC.
    include!("generated/coracle.peer.v1.rs");
}

/// The public services as an encoded `google.protobuf.FileDescriptorSet`: what server reflection
/// serves. The messages between nodes are not in it.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptor.bin");

pub mod limits;

pub mod reason;

pub mod entity;

pub mod ring;

pub mod shard_map;

pub mod token;

pub mod delete_range;
