//! Every route of REST: path, query, headers, cookies, origin, JSON.

use super::Target;
use crate::http::{REST, check_json};

pub const TARGET: Target = Target {
    name: "rest",
    seeds: &[
        b"POST /auth/register\ncontent-type: application/json\n\n{\"username\":\"anna\",\"email\":\"anna@example.com\",\"password\":\"c4nary-password\"}",
        b"POST /register?x=1\nContent-Type: application/json; charset=utf-8\nidempotency-key: k-1\nx-correlation-id: c-1\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\nuser-agent: Mozilla/5.0\n\n\xef\xbb\xbf{\"username\":\"a\\u0000b\",\"email\":\"x\",\"password\":\"c4nary\"}",
        b"POST /Auth/Login/\ncontent-type: application/json\norigin: https://app.example\nhost: auth.test\n\n{\"identifier\":\"anna\",\"password\":\"c4nary-password\"}",
        b"POST /login\ncontent-type: application/json\nsec-fetch-site: cross-site\naccept: application/problem+json;q=0.5\n\n{\"email\":\"anna@example.com\",\"password\":[1,{\"a\":null}]}",
        b"POST /auth/login\ncontent-type: application/json\n\n{\"username\":\"anna\",\"username\":\"c4nary\",\"password\":\"c4nary\"}",
        b"DELETE /auth/logout?scope=all\ncookie: theme=d\xc3\xbcnkel; accessToken={access}; refreshToken={refresh}\n\n",
        b"DELETE /logout?scope=others\ncookie: accessToken=\"a.b.c\"; accessToken={access}\norigin: null\n\n",
        b"GET /auth/me\ncookie: accessToken={access}; refreshToken={refresh}\n\n",
        b"GET /me\ncookie: accessToken=a.b.c; refreshToken=\x80\n\n",
        b"POST /auth/refresh\ncookie: refreshToken={refresh}\n\n",
        b"POST /refresh\ncontent-type: application/json\n\n{\"refreshToken\":\"c4nary\"}",
        b"OPTIONS /auth/login\norigin: https://app.example\naccess-control-request-method: POST\naccess-control-request-headers: content-type, traceparent\n\n",
        b"GET /auth/health/live\n\n",
        b"HEAD /.well-known/jwks.json\n\n",
        b"PUT /auth/%ff/../password\nexpect: 100-continue\ncontent-length: 99999999999\n\n{",
    ],
    run: |input| check_json(input, &REST),
};
