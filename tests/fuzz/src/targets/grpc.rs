//! Every gRPC service: path, metadata, framing, messages.

use auth_proto::{
    auth::v1::{GetAccountRequest, MarkVerifiedRequest, RefreshAccessTokenRequest, ValidateAccessTokenRequest},
    legacy::token::RefreshTokenRequest,
};
use axum::{
    body::Body,
    http::{HeaderValue, Request, Uri, header},
};
use prost::Message;
use tonic::Code;

use super::Target;
use crate::{
    http::{GRPC, answer, headers},
    parts::{parts, text},
    service::filled_in,
};

/// A path; metadata lines; how the rest is meant (`raw`: the body itself, `token`: the text of a token, `id`: a number,
/// else: the message); the rest.
pub const TARGET: Target = Target {
    name: "grpc",
    seeds: &[
        b"/auth.v1.TokenService/RefreshAccessToken\x1e\x1etoken\x1e{refresh}",
        b"/auth.v1.TokenService/ValidateAccessToken\x1ex-request-id: r-1\x1etoken\x1e{access}",
        b"/auth.v1.TokenService/ValidateAccessToken\x1e\x1e\x1e\x0a\x05a.b.c",
        b"/auth.v1.AccountService/GetAccount\x1eauthorization: Bearer m-secret\x1eid\x1e7",
        b"/auth.v1.AccountService/MarkVerified\x1eauthorization: bearer m-secret\ngrpc-timeout: 5S\x1e\x1e\x08\x07",
        b"/token.Token/RefreshToken\x1e\x1etoken\x1e{refresh}",
        b"/token.Token/RefreshToken\x1egrpc-encoding: gzip\x1eraw\x1e\x01\x00\x00\x00\x02\x0a\x00",
        b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo\x1e\x1e\x1e\x3a\x01*",
        b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo\x1e\x1e\x1e\x1a\x10auth.v1.Account",
        b"/auth.v1.TokenService/None\x1eauthorization: Basic x\x1eraw\x1e\x00\xff\xff\xff\xff",
    ],
    run,
};

fn run(input: &[u8]) {
    let [path, lines, meant, rest] = parts(input);
    let Ok(path) = Uri::try_from(path) else { return };
    let mut request = Request::post(path.clone()).body(body(path.path(), meant, rest)).expect("a request");
    *request.headers_mut() = headers(lines.split(|byte| *byte == b'\n'));
    request.headers_mut().entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
    let answer = answer(&GRPC, request);
    // A content type that is not gRPC's has an HTTP status of its own.
    if !answer.status.is_success() {
        assert!(answer.status.is_client_error(), "{} for {path}", answer.status);
        return;
    }
    let code = answer.headers.get("grpc-status").or(answer.trailers.get("grpc-status"));
    let code = Code::from_bytes(code.unwrap_or_else(|| panic!("no code for {path}")).as_bytes());
    assert!(!matches!(code, Code::Internal | Code::Unknown | Code::DataLoss), "{code:?} for {path}");
}

fn body(path: &str, meant: &[u8], rest: &[u8]) -> Body {
    let message = match meant {
        b"raw" => return Body::from(rest.to_vec()),
        b"token" => {
            let token = text(&filled_in(rest));
            match path {
                "/token.Token/RefreshToken" => RefreshTokenRequest { refresh_token: token }.encode_to_vec(),
                "/auth.v1.TokenService/ValidateAccessToken" => {
                    ValidateAccessTokenRequest { access_token: token }.encode_to_vec()
                }
                _ => RefreshAccessTokenRequest { refresh_token: token }.encode_to_vec(),
            }
        }
        b"id" => {
            let user_id = text(rest).parse().unwrap_or_default();
            match path {
                "/auth.v1.AccountService/MarkVerified" => MarkVerifiedRequest { user_id }.encode_to_vec(),
                _ => GetAccountRequest { user_id }.encode_to_vec(),
            }
        }
        _ => rest.to_vec(),
    };
    let length = u32::try_from(message.len()).expect("a short message").to_be_bytes();
    Body::from([&[0], &length[..], &message].concat())
}
