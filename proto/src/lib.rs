//! The gRPC contracts as Rust types, generated at build time without `protoc`.
//!
//! The `.proto` files beside this crate's manifest are the documentation of every call; this
//! crate adds nothing to them.
//!
//! - [`auth::v1`]: what gateways and other services call here.
//! - [`user::v1`]: what this service calls at the user-service.
//! - [`legacy`]: the two contracts of the original fleet.
#![expect(missing_docs, reason = "the contracts are documented in their .proto files")]

/// `auth.*`
pub mod auth {
    /// `auth.v1`: tokens and accounts.
    pub mod v1 {
        tonic::include_proto!("auth.v1");
    }
}

/// `user.*`
pub mod user {
    /// `user.v1`: the owner of user profiles.
    pub mod v1 {
        tonic::include_proto!("user.v1");
    }
}

/// Contracts of the original fleet, under their original package names.
pub mod legacy {
    /// Package `token`: how the original gateway asks for an access token.
    pub mod token {
        tonic::include_proto!("token");
    }
    /// Package `auth`: how the original user-service is told to create a user.
    pub mod auth {
        tonic::include_proto!("auth");
    }
}

/// The encoded `FileDescriptorSet` of all contracts, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
