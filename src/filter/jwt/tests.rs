//! Tokens of the RFCs, tokens of our own, and known attacks.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use boring::ec::{EcGroup, EcKey};
use boring::ecdsa::EcdsaSig;
use boring::hash::{MessageDigest, hash};
use boring::nid::Nid;
use boring::pkey::{PKey, Private};
use boring::rsa::{Padding, Rsa};
use boring::sign::{RsaPssSaltlen, Signer};
use hmac::{Hmac, Mac};
use jsonwebtoken::{DecodingKey, get_current_timestamp};
use serde_json::json;
use sha2::Sha256;

use super::super::rehearsal::{Rehearsal, error, values};
use super::crypto::Verifying;
use super::*;

/// RFC 7515 §A.1 to §A.3: the keys, and the same payload signed with each. It expired in 2011.
const HS_KEY: &str = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow";
const RS_N: &str = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";
const ES_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
const ES_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";
const PAYLOAD: &str = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
const HS_SIGNED: (&str, &str) =
    ("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9", "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
const RS_SIGNED: (&str, &str) = (
    "eyJhbGciOiJSUzI1NiJ9",
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw",
);
const ES_SIGNED: (&str, &str) =
    ("eyJhbGciOiJFUzI1NiJ9", "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q");

/// The keys of the RFC as a set.
fn rfc_keys() -> Value {
    json!({ "keys": [
        { "kty": "oct", "k": HS_KEY, "kid": "hs" },
        { "kty": "RSA", "n": RS_N, "e": "AQAB", "kid": "rs" },
        { "kty": "EC", "crv": "P-256", "x": ES_X, "y": ES_Y, "kid": "es" },
    ] })
}

/// A filter with these keys in a file.
fn jwt(keys: &Value, settings: &str) -> Rehearsal {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), keys.to_string()).unwrap();
    Rehearsal::of(&format!("- jwt: {{ keys: {{ file: {{ path: {} }} }}, {settings} }}", file.path().display()))
}

/// The reason for which a token is refused; `ok` if it is accepted.
fn told(rehearsal: Rehearsal, token: &str) -> &'static str {
    match rehearsal.asking("/", &[("authorization", &format!("Bearer {token}"))]).verdict() {
        Verdict::Continue => "ok",
        Verdict::Refuse(refused) => refused.refusal.reason,
        other => panic!("{other:?}"),
    }
}

const ALL: &str = "algorithms: [HS256, RS256, ES256, EdDSA, PS256]";

#[test]
fn the_tokens_of_the_rfc_are_signed_and_long_expired() {
    let keys = rfc_keys();
    for (header, signature) in [HS_SIGNED, RS_SIGNED, ES_SIGNED] {
        let token = format!("{header}.{PAYLOAD}.{signature}");
        assert_eq!(told(jwt(&keys, ALL), &token), "route.jwt_expired", "{header}");
        // Another payload, another signature, another order.
        let forged = token.replacen("joe", "eve", 1).replacen("eyJpc3MiOiJqb2Ui", "eyJpc3MiOiJldmUi", 1);
        assert_eq!(told(jwt(&keys, ALL), &forged), "route.jwt_invalid", "{header}");
        for changed in 0..3 {
            let mut bytes = token.clone().into_bytes();
            let place = bytes.len() - 10 - changed;
            bytes[place] = if bytes[place] == b'A' { b'B' } else { b'A' };
            assert_eq!(told(jwt(&keys, ALL), std::str::from_utf8(&bytes).unwrap()), "route.jwt_invalid", "{header}");
        }
    }
}

/// RFC 8037 §A.4: the signed content is text, not a token.
#[test]
fn the_signature_of_rfc_8037_is_right() {
    use jsonwebtoken::signature::Verifier;
    let key = DecodingKey::from_ed_components("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo").unwrap();
    let verifying = Verifying::new(Algorithm::EdDSA, &key).unwrap();
    let message = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
    let signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    assert!(verifying.verify(message, &signature).is_ok());
    assert!(verifying.verify(b"another", &signature).is_err());
    assert!(verifying.verify(message, &signature[1..].to_vec()).is_err());
}

/// A secret, and tokens that are signed with it.
const SECRET: [u8; 32] = [7; 32];

fn own_keys() -> Value {
    json!({ "keys": [ { "kty": "oct", "k": URL_SAFE_NO_PAD.encode(SECRET), "kid": "own", "alg": "HS256" } ] })
}

fn signed_with(secret: &[u8], header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(header), part(claims));
    let mac = <Hmac<Sha256> as Mac>::new_from_slice(secret).unwrap().chain_update(&message).finalize();
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.into_bytes()))
}

fn signed(claims: &Value) -> String {
    signed_with(&SECRET, &json!({ "alg": "HS256", "kid": "own" }), claims)
}

/// These claims, which expire in ten minutes.
fn lasting(mut claims: Value) -> Value {
    claims["exp"] = (get_current_timestamp() + 600).into();
    claims
}

const HS: &str = "algorithms: [HS256]";

#[test]
fn claims_go_to_headers_and_to_expressions() {
    let claims = lasting(json!({
        "sub": "ada", "tenant": "acme", "level": 3, "staff": true, "gone": null,
        "roles": ["admin", "dev"], "realm_access": { "roles": ["a"], "deep": { "er": "x" } },
    }));
    let names = "X-User: sub, X-Roles: roles, X-Realm: realm_access.roles, X-Gone: gone, X-Level: level";
    let settings = format!("{HS}, claims: {{ {names} }}");
    let filters = jwt(&own_keys(), &settings);
    let token = format!("bearer {}", signed(&claims));
    let forged = [("authorization", &*token), ("x-user", "root"), ("x-gone", "forged"), ("x-realm", "forged")];
    let mut rehearsal = filters.asking("/", &forged);
    let headers = &rehearsal.pass().headers;
    assert_eq!((values(headers, "x-user"), values(headers, "x-roles")), (vec!["ada"], vec!["admin, dev"]));
    assert_eq!((values(headers, "x-realm"), values(headers, "x-level")), (vec!["a"], vec!["3"]));
    assert_eq!((values(headers, "x-gone"), values(headers, "authorization")), (vec![], vec![]));

    let Value::Object(map) = &claims else { panic!() };
    let flat = flat(map);
    assert!(flat.is_sorted_by_key(|(name, _)| name.clone()), "{flat:?}");
    let identity = Identity { user: "".into(), by: "jwt", claims: flat };
    assert_eq!(identity.claim(b"realm_access.deep.er"), ["x".into()]);
    assert_eq!(identity.claim(b"roles"), ["admin".into(), "dev".into()]);
    assert!(identity.claim(b"gone").is_empty() && identity.claim(b"nothing").is_empty());
}

#[test]
fn claims_without_end_are_cut() {
    let many: Map<String, Value> = (0..10_000).map(|number| (format!("c{number}"), "x".repeat(100).into())).collect();
    let flat = flat(&many);
    assert!(flat.len() <= CLAIMS_MAX && flat.len() > 100, "{}", flat.len());
    let mut deep = json!("x");
    for _ in 0..100 {
        deep = json!({ "a": deep });
    }
    let Value::Object(deep) = deep else { panic!() };
    assert!(super::flat(&deep).is_empty());
}

#[test]
fn a_token_is_in_force_between_its_times() {
    let now = get_current_timestamp();
    let of = |settings: &str, claims: Value| told(jwt(&own_keys(), &format!("{HS}, {settings}")), &signed(&claims));
    assert_eq!(of("", json!({ "exp": now + 10 })), "ok");
    assert_eq!(of("", json!({ "exp": now - 30 })), "ok", "within the leeway");
    assert_eq!(of("leeway: 0s", json!({ "exp": now - 30 })), "route.jwt_expired");
    assert_eq!(of("", json!({ "exp": now - 90 })), "route.jwt_expired");
    assert_eq!(of("", json!({ "exp": now + 100, "nbf": now + 90 })), "route.jwt_expired", "not yet");
    assert_eq!(of("", json!({ "exp": now + 100, "nbf": now + 30 })), "ok");
    assert_eq!(of("", json!({})), "route.jwt_invalid", "without an end");
    assert_eq!(of("require: []", json!({})), "ok");
    for end in [json!("soon"), json!(-1), json!(1e300), json!([now + 100]), json!(null)] {
        assert_eq!(of("", json!({ "exp": end })), "route.jwt_invalid", "{end}");
    }
    assert_eq!(of("require: [exp, sub]", lasting(json!({}))), "route.jwt_invalid");
}

#[test]
fn a_token_is_meant_for_us_and_made_by_whom_we_know() {
    let of =
        |settings: &str, claims: Value| told(jwt(&own_keys(), &format!("{HS}, {settings}")), &signed(&lasting(claims)));
    let both = "issuer: [idp, idp2], audience: [shop]";
    assert_eq!(of(both, json!({ "iss": "idp2", "aud": "shop" })), "ok");
    assert_eq!(of(both, json!({ "iss": "idp", "aud": ["other", "shop"] })), "ok");
    assert_eq!(of(both, json!({ "iss": "idp", "aud": ["other"] })), "route.jwt_audience");
    assert_eq!(of(both, json!({ "iss": "evil", "aud": "shop" })), "route.jwt_audience");
    assert_eq!(of(both, json!({ "aud": "shop" })), "route.jwt_invalid", "it names no issuer");
    assert_eq!(of(both, json!({ "iss": "idp" })), "route.jwt_invalid", "it names no audience");
    assert_eq!(of("", json!({ "aud": "others" })), "route.jwt_audience", "RFC 7519 §4.1.3");
    assert_eq!(of("", json!({})), "ok");
}

#[test]
fn no_algorithm_is_none_and_a_public_key_is_no_secret() {
    let (keys, claims) = (rfc_keys(), lasting(json!({ "sub": "eve" })));
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    for none in ["none", "None", "NONE", "nOnE", ""] {
        let head = part(&json!({ "alg": none }));
        for signature in ["", "AA"] {
            let token = format!("{head}.{}.{signature}", part(&claims));
            assert_eq!(told(jwt(&keys, ALL), &token), "route.jwt_invalid", "{none}");
        }
    }
    // The public key, in any form, as the secret of an HMAC.
    let n = URL_SAFE_NO_PAD.decode(RS_N).unwrap();
    let jwk = keys["keys"][1].to_string();
    for secret in [&n[..], RS_N.as_bytes(), jwk.as_bytes()] {
        for header in [json!({ "alg": "HS256" }), json!({ "alg": "HS256", "kid": "rs" })] {
            let token = signed_with(secret, &header, &claims);
            assert_eq!(told(jwt(&keys, ALL), &token), "route.jwt_invalid");
            assert_eq!(told(jwt(&keys, "algorithms: [RS256]"), &token), "route.jwt_invalid");
        }
    }
    // With the right secret, but with an algorithm that is not configured.
    let token = signed(&lasting(json!({})));
    assert_eq!(told(jwt(&own_keys(), "algorithms: [RS256, ES256]"), &token), "route.jwt_invalid");
    assert_eq!(told(jwt(&own_keys(), "algorithms: [HS512]"), &token), "route.jwt_invalid");
}

#[test]
fn what_a_token_says_of_keys_is_not_believed() {
    let (mine, claims) = ([9; 32], lasting(json!({ "sub": "eve" })));
    let jwk = json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode(mine), "kid": "mine" });
    for header in [
        json!({ "alg": "HS256", "jwk": jwk }),
        json!({ "alg": "HS256", "kid": "own", "jwk": jwk }),
        json!({ "alg": "HS256", "jku": "https://evil.test/jwks.json", "kid": "mine" }),
        json!({ "alg": "HS256", "x5u": "https://evil.test/", "kid": "own" }),
        json!({ "alg": "HS256", "kid": "../../dev/null" }),
        json!({ "alg": "HS256", "kid": "' OR 1=1 --" }),
        json!({ "alg": "HS256", "kid": "own\u{0}" }),
        json!({ "alg": "HS256", "kid": "" }),
        json!({ "alg": "HS256", "kid": "x".repeat(4000) }),
        json!({ "alg": "HS256", "kid": ["own"] }),
        json!({ "alg": ["HS256"], "kid": "own" }),
    ] {
        for secret in [&mine[..], b""] {
            assert_eq!(
                told(jwt(&own_keys(), HS), &signed_with(secret, &header, &claims)),
                "route.jwt_invalid",
                "{header}"
            );
        }
    }
    // RFC 7515 §4.1.11; the signature is valid.
    for crit in [json!(["exp"]), json!(["b64"]), json!([])] {
        let header = json!({ "alg": "HS256", "kid": "own", "crit": crit, "b64": false });
        assert_eq!(told(jwt(&own_keys(), HS), &signed_with(&SECRET, &header, &claims)), "route.jwt_invalid");
    }
}

#[test]
fn what_is_no_token_is_refused() {
    let good = signed(&lasting(json!({})));
    let parts: Vec<&str> = good.split('.').collect();
    let (two, four, padded) = (parts[..2].join("."), format!("{good}.x"), format!("{good}="));
    let (turned, spaced) = (format!("{}.{}.{}", parts[1], parts[0], parts[2]), good.replacen('.', ". ", 1));
    let large = signed(&lasting(json!({ "x": "y".repeat(9_000) })));
    for token in ["", ".", "..", "...", "a.b.c", &two, &four, &padded, &turned, &spaced, &large] {
        assert_eq!(told(jwt(&own_keys(), HS), token), "route.jwt_invalid", "{token}");
    }
    assert_eq!(told(jwt(&own_keys(), &format!("{HS}, max_token: 64KiB")), &large), "ok");
    // Payloads that are not claims; the signature is valid.
    for payload in [json!([]), json!("x"), json!(1)] {
        assert_eq!(told(jwt(&own_keys(), HS), &signed(&payload)), "route.jwt_invalid");
    }
    let twice = format!("{{\"exp\":1,\"exp\":{}}}", get_current_timestamp() + 100);
    let message = format!("{}.{}", parts[0], URL_SAFE_NO_PAD.encode(twice));
    let mac = <Hmac<Sha256> as Mac>::new_from_slice(&SECRET).unwrap().chain_update(&message).finalize();
    let token = format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.into_bytes()));
    assert_eq!(told(jwt(&own_keys(), HS), &token), "route.jwt_invalid", "two ends");
}

#[test]
fn who_shows_none_or_two_is_refused_with_a_challenge() {
    let token = format!("Bearer {}", signed(&lasting(json!({}))));
    let refused = |headers: &[(&'static str, &str)]| {
        let refused = jwt(&own_keys(), HS).asking("/", headers).refused();
        (refused.refusal.reason, refused.headers[0].1.to_str().unwrap().to_owned())
    };
    let missing = ("route.jwt_missing", "Bearer realm=\"Restricted\"".to_owned());
    assert_eq!(refused(&[]), missing);
    assert_eq!(refused(&[("authorization", "Basic abc")]), missing);
    let invalid = ("route.jwt_invalid", "Bearer realm=\"Restricted\", error=\"invalid_token\"".to_owned());
    assert_eq!(refused(&[("authorization", &token), ("authorization", &token)]), invalid);
    let optional = format!("{HS}, optional: true, claims: {{ X-User: sub }}");
    let mut anonymous = jwt(&own_keys(), &optional).asking("/", &[("x-user", "forged")]);
    assert_eq!(values(&anonymous.pass().headers, "x-user"), [""; 0]);
    assert_eq!(told(jwt(&own_keys(), &optional), "junk"), "route.jwt_invalid");
}

#[test]
fn a_token_may_come_in_a_cookie_a_header_or_the_query() {
    let token = signed(&lasting(json!({})));
    let cookie = format!("a=1; session={token}; b=2");
    let mut rehearsal =
        jwt(&own_keys(), &format!("{HS}, from: {{ cookie: session }}")).asking("/", &[("cookie", &cookie)]);
    assert_eq!(values(&rehearsal.pass().headers, "cookie"), ["a=1; b=2"]);
    let kept = format!("{HS}, forward: true, from: {{ cookie: session }}");
    let mut rehearsal = jwt(&own_keys(), &kept).asking("/", &[("cookie", &cookie)]);
    assert_eq!(values(&rehearsal.pass().headers, "cookie"), [&*cookie]);
    let two = format!("session={token}; session=x");
    let mut rehearsal =
        jwt(&own_keys(), &format!("{HS}, from: {{ cookie: session }}")).asking("/", &[("cookie", &two)]);
    assert_eq!(rehearsal.refused().refusal.reason, "route.jwt_invalid");
    let mut rehearsal =
        jwt(&own_keys(), &format!("{HS}, from: {{ header: X-Token }}")).asking("/", &[("x-token", &token)]);
    assert_eq!(values(&rehearsal.pass().headers, "x-token"), [""; 0]);
    jwt(&own_keys(), &format!("{HS}, from: {{ query: token }}")).asking(&format!("/?token={token}"), &[]).pass();
}

/// A token that is signed with an RSA key.
fn rsa_signed(key: &PKey<Private>, algorithm: &str) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(&json!({ "alg": algorithm })), part(&lasting(json!({}))));
    let digest = match &algorithm[2..] {
        "256" => MessageDigest::sha256(),
        "384" => MessageDigest::sha384(),
        _ => MessageDigest::sha512(),
    };
    let mut signer = Signer::new(digest, key).unwrap();
    if algorithm.starts_with("PS") {
        signer.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
        signer.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH).unwrap();
        signer.set_rsa_mgf1_md(digest).unwrap();
    }
    let signature = signer.sign_oneshot_to_vec(message.as_bytes()).unwrap();
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[test]
fn rsa_keys_sign_with_their_algorithms_and_small_ones_with_none() {
    let rsa = Rsa::generate(2048).unwrap();
    let jwk = |rsa: &Rsa<Private>| {
        let (n, e) = (URL_SAFE_NO_PAD.encode(rsa.n().to_vec()), URL_SAFE_NO_PAD.encode(rsa.e().to_vec()));
        json!({ "kty": "RSA", "n": n, "e": e })
    };
    let keys = json!({ "keys": [jwk(&rsa)] });
    let key = PKey::from_rsa(rsa).unwrap();
    let every = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];
    for algorithm in every {
        let token = rsa_signed(&key, algorithm);
        assert_eq!(told(jwt(&keys, &format!("algorithms: [{}]", every.join(", "))), &token), "ok", "{algorithm}");
        let others: Vec<&str> = every.into_iter().filter(|other| *other != algorithm).collect();
        let others = format!("algorithms: [{}]", others.join(", "));
        assert_eq!(told(jwt(&keys, &others), &token), "route.jwt_invalid", "{algorithm}");
    }
    let small = jwk(&Rsa::generate(1024).unwrap());
    assert!(KeySet::parse(&json!({ "keys": [small] }).to_string()).is_err());
    let short = json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode([1; 31]) });
    assert!(KeySet::parse(&json!({ "keys": [short] }).to_string()).is_err(), "RFC 7518 §3.2");
}

#[test]
fn elliptic_signatures_are_two_numbers_and_neither_is_zero() {
    for (name, curve, crv, length) in
        [("ES256", Nid::X9_62_PRIME256V1, "P-256", 32), ("ES384", Nid::SECP384R1, "P-384", 48_i32)]
    {
        let group = EcGroup::from_curve_name(curve).unwrap();
        let key = EcKey::generate(&group).unwrap();
        let (mut x, mut y) = (boring::bn::BigNum::new().unwrap(), boring::bn::BigNum::new().unwrap());
        let mut context = boring::bn::BigNumContext::new().unwrap();
        key.public_key().affine_coordinates_gfp(&group, &mut x, &mut y, &mut context).unwrap();
        let number = |number: &boring::bn::BigNum| {
            let bytes = number.to_vec();
            let mut padded = vec![0; usize::try_from(length).unwrap() - bytes.len()];
            padded.extend(bytes);
            padded
        };
        let coordinate = |value: &boring::bn::BigNum| URL_SAFE_NO_PAD.encode(number(value));
        let keys = json!({ "keys": [ { "kty": "EC", "crv": crv, "x": coordinate(&x), "y": coordinate(&y) } ] });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&json!({ "alg": name })), part(&lasting(json!({}))));
        let digest = if length == 32 { MessageDigest::sha256() } else { MessageDigest::sha384() };
        let signature = EcdsaSig::sign(&hash(digest, message.as_bytes()).unwrap(), &key).unwrap();
        let raw = [number(&signature.r().to_owned().unwrap()), number(&signature.s().to_owned().unwrap())].concat();
        let of = |signature: &[u8]| {
            let token = format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature));
            told(jwt(&keys, "algorithms: [ES256, ES384]"), &token)
        };
        assert_eq!(of(&raw), "ok", "{name}");
        let zeros = vec![0; raw.len()];
        for wrong in [&zeros[..], &signature.to_der().unwrap(), &raw[1..], &[], &[&raw[..], &[0]].concat()] {
            assert_eq!(of(wrong), "route.jwt_invalid", "{name}");
        }
    }
}

#[test]
fn wrong_settings_are_told_with_their_place() {
    let keys = "keys: { file: { path: /nowhere/jwks.json } }";
    let told = |settings: &str| error(&format!("- jwt: {{ {settings} }}"));
    assert!(told(keys).starts_with("[0].jwt.keys.file.path: `/nowhere/jwks.json` cannot be read"), "{}", told(keys));
    for (setting, at) in [
        ("algorithms: []", "algorithms"),
        ("algorithms: [none]", "algorithms[0]"),
        ("leeway: 1h", "leeway"),
        ("require: [jti]", "require[0]"),
        ("claims: { Host: sub }", "claims.Host"),
        ("claims: { X-User: '' }", "claims.X-User"),
        ("from: { header: 'a b' }", "from.header"),
        ("realm: ''", "realm"),
    ] {
        let told = told(&format!("{keys}, {setting}"));
        assert!(told.starts_with(&format!("[0].jwt.{at}: ")), "{told}");
    }
    assert!(
        told("keys: { service: { upstream: idp } }").starts_with("[0].jwt.keys.service.upstream: there is no upstream")
    );
}
